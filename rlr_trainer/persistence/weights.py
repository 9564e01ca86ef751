"""The trained weights on disk: LoRA or the whole network, averaged or as training goes on with them, sharded or not."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

from rlr_trainer.pipelines import PipelineAdapter
from rlr_trainer.pipelines.average import WeightAverage
from rlr_trainer.pipelines.sharding import spread_when_loaded, whole_weights

AVERAGE_FOLDER = "average"  # the averaged weights of a checkpoint


class Weights:
    """Saves and loads what is trained, with `use_lora` the LoRA weights alone; `adapter` knows the formats."""

    def __init__(self, adapter: PipelineAdapter, use_lora: bool, average: WeightAverage | None = None) -> None:
        self.adapter, self.use_lora, self.average = adapter, use_lora, average

    def averaged(self) -> AbstractContextManager[None]:
        """Inside it the policy has its averaged weights; without averaging nothing changes."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Inside it, weights that are spread over processes are put together; collective."""
        return whole_weights(self.adapter.denoiser)

    def save_result(self, folder: Path) -> None:
        """Writes what to use: LoRA weights for the pipeline's own loader, or the whole pipeline; averaged if there is an average."""
        with self.averaged():
            if self.use_lora:
                self.adapter.save_lora(folder)
            else:
                self.adapter.pipeline.save_pretrained(folder)

    def save(self, folder: Path) -> None:
        """Writes what training goes on with, and the average beside it."""
        self._write(folder)
        if self.average is not None:
            (folder / AVERAGE_FOLDER).mkdir(exist_ok=True)
            with self.averaged():
                self._write(folder / AVERAGE_FOLDER)

    def load(self, folder: Path) -> None:
        """Reads back what `save` wrote; collective.

        Raises:
            ValueError: weights that are missing, damaged, or of another network.
        """
        load = self.adapter.load_lora if self.use_lora else self.adapter.load_denoiser
        if self.average is None:
            with spread_when_loaded(self.adapter.denoiser):
                load(folder)
            return
        has_average = (folder / AVERAGE_FOLDER).is_dir()  # not if it is a checkpoint of a run without averaging
        load(folder / AVERAGE_FOLDER if has_average else folder)
        self.average.take_present_weights(self.average.updates)
        load(folder)

    def _write(self, folder: Path) -> None:
        if self.use_lora:
            self.adapter.save_lora(folder)
        else:
            self.adapter.save_denoiser(folder)
