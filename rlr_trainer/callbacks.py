"""Callbacks and trackers: the run's metrics file, progress bars, and pictures for image hooks."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends every log line to `metrics.jsonl` in the output folder; a resumed run drops what lies past its checkpoint.

    It starts with the training: an evaluation before must not make the folder look like that of a run.
    """

    def __init__(self) -> None:
        self._started = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._started = True
        path = Path(args.output_dir) / METRICS_FILE
        lines = path.read_text().splitlines() if path.is_file() and state.global_step > 0 else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not self._started or not logs:
            return
        row = {"step": state.global_step} | {name: _plain(value) for name, value in logs.items()}
        with open(Path(args.output_dir) / METRICS_FILE, "a") as file:
            file.write(json.dumps(row) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN: it is written as null."""
    if isinstance(value, Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RewardProgress(ProgressCallback):
    """Trainer's progress bar with the reward behind it, in place of a printed line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.3f}")


def rollout_progress(total: int, label: str, disable: bool) -> tqdm:
    """A bar inside Trainer's own; quiet when it is disabled or the output is not a terminal."""
    return tqdm(total=total, desc=label, leave=False, disable=disable or not sys.stderr.isatty(), position=1)


class HookTracker:
    """What an image hook logs to: the run's trackers, or PNG files in the output folder when there is none.

    It has the methods of an accelerate tracker that DDPO's hooks use.

    Args:
        callbacks: Trainer's callbacks, among them its integrations.
        folder: the run's output folder.
    """

    def __init__(self, callbacks: Sequence[Any], folder: Path) -> None:
        self._writers = [c.tb_writer for c in callbacks if getattr(c, "tb_writer", None) is not None]
        self._wandb = next((c._wandb for c in callbacks if getattr(c, "_wandb", None) is not None), None)
        self.folder = folder

    @property
    def tracker(self) -> Any:
        """The first underlying tracker, or None."""
        return next(iter([*self._writers, *([self._wandb] if self._wandb else [])]), None)

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs numbers and texts by name."""
        for writer in self._writers:
            for name, value in values.items():
                if isinstance(value, str):
                    writer.add_text(name, value, global_step=step)
                else:
                    writer.add_scalar(name, value, global_step=step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs pictures by name: [3, H, W] or [N, 3, H, W] in [0, 1], or channels last (array, tensor or PIL)."""
        pictures = {name: to_pictures(value) for name, value in values.items()}
        for writer in self._writers:
            for name, batch in pictures.items():
                writer.add_images(name, batch, global_step=step)
        if self._wandb is not None:
            rows = {n: [self._wandb.Image(p.permute(1, 2, 0).numpy()) for p in batch] for n, batch in pictures.items()}
            self._wandb.log(rows, step=step)
        if self.tracker is None:
            self._save(pictures, step)

    def _save(self, pictures: Mapping[str, Tensor], step: int | None) -> None:
        from PIL import Image

        folder = self.folder / "images" / f"step_{step or 0:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, batch in pictures.items():
            row = torch.cat(list(batch), dim=2)  # side by side
            pixels = (row.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:100]
            Image.fromarray(pixels).save(folder / f"{safe}.png")


def to_pictures(value: Any) -> Tensor:
    """Any usual form of one or several pictures as float [N, 3, H, W] in [0, 1]."""
    import numpy as np

    array = torch.as_tensor(np.asarray(value)) if not isinstance(value, Tensor) else value.detach().cpu()
    if not array.is_floating_point():
        array = array.float() / 255
    array = array.float()
    array = array[None] if array.dim() == 3 else array
    return array.permute(0, 3, 1, 2) if array.shape[1] != 3 and array.shape[-1] == 3 else array
