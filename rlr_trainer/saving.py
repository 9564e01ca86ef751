"""What a run leaves on disk: weights, state, settings, model card; and how it is read back."""

from __future__ import annotations

import json
import logging
import shutil
from collections import deque
from pathlib import Path

from torch import nn

from rlr_trainer import compat
from rlr_trainer.config import RLRConfig
from rlr_trainer.estimators.advantages import PerPromptStatistics
from rlr_trainer.estimators.prediction import ControlVariateScale
from rlr_trainer.experience import Experience
from rlr_trainer.model_card import write_model_card
from rlr_trainer.pipelines import PipelineAdapter, Policy
from rlr_trainer.plan import StartDistribution
from rlr_trainer.prompts import DatasetPrompts, FunctionPrompts
from rlr_trainer.rewards.interface import Rewards

logger = logging.getLogger(__name__)

STATE_FILE = "rlr_state.json"
CONFIG_FILE = "rlr_config.json"
RUN_MARKS = ("checkpoint-*", "metrics.jsonl", "*.safetensors", "model_index.json")  # files that say that a run lives here


class SavingTrainer(compat.BaseTrainer):
    """The part of `RLRTrainer` that saves and loads."""

    args: RLRConfig
    model: nn.Module
    policy: Policy
    adapter: PipelineAdapter
    use_lora: bool
    rewards: Rewards
    prompts: FunctionPrompts | DatasetPrompts
    starts: StartDistribution | None
    control_scale: ControlVariateScale | None
    statistics: PerPromptStatistics | None
    _queue: deque[Experience]
    _rollouts_done: int

    _chosen: dict[str, int]

    def _set_plan(self, **chosen: int) -> None:
        raise NotImplementedError

    def check_output_folder(self) -> None:
        """Refuses an `output_dir` that holds another run, unless `overwrite` is set; `train` calls it first.

        Raises:
            ValueError: the folder holds a run.
        """
        folder = Path(self.args.output_dir)
        found = [path.name for mark in RUN_MARKS for path in sorted(folder.glob(mark))] if folder.is_dir() else []
        if found and self.args.overwrite:
            for checkpoint in folder.glob("checkpoint-*"):  # or a later resume would take up the other run
                logger.warning("overwrite=True: removing %s of an earlier run", checkpoint)
                shutil.rmtree(checkpoint)
        elif found and self.state.global_step == 0:
            raise ValueError(
                f"output_dir={str(folder)!r} holds another run ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}): choose another "
                "folder, continue it with train(resume_from_checkpoint=True), or allow overwriting with overwrite=True (--overwrite)"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.use_lora:
            self.adapter.save_lora(folder)
        elif folder.name.startswith("checkpoint-"):
            self.adapter.save_denoiser(folder)
        else:
            self.adapter.pipeline.save_pretrained(folder)
        (folder / CONFIG_FILE).write_text(json.dumps(self.args.rlr_options(), indent=2, default=str))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes the trained weights and a model card: LoRA weights for `load_lora_weights`, or the whole pipeline."""
        self.save_model(str(save_directory), _internal_call=True)
        if self.is_world_process_zero():
            write_model_card(self, Path(save_directory))

    def create_model_card(  # type: ignore[override]  # TRL's signature, not transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes README.md to `output_dir`, with how to load the weights and the settings of the run."""
        if self.is_world_process_zero():
            write_model_card(self, Path(self.args.output_dir), model_name, dataset_name, tags)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if not self.is_world_process_zero():
            return
        state = {
            "rollouts_done": self._rollouts_done,
            "pending_micro_batches": len(self._queue),
            "reward_queries": self.rewards.queries,
            "prompts": self.prompts.state_dict(),
            "chosen": self._chosen,  # in place of "auto"
        }
        for name in ("starts", "control_scale", "statistics"):
            part = getattr(self, name)
            if part is not None:
                state[name] = part.state_dict()
        (Path(output_dir) / STATE_FILE).write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_weights(folder)
        try:
            state = json.loads((folder / STATE_FILE).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot resume from {folder}: {STATE_FILE} is missing or damaged ({error})") from error
        if state["pending_micro_batches"]:
            raise ValueError(
                f"cannot resume from {folder}: it was saved in the middle of a rollout ({state['pending_micro_batches']} micro-batches "
                f"left); save at multiples of the {self.args.updates_per_rollout} updates of a rollout (save_steps)"
            )
        self._set_plan(**state["chosen"])  # the run goes on with what was chosen at its start
        self._rollouts_done = state["rollouts_done"]
        self.rewards.queries = state["reward_queries"]
        self.prompts.load_state_dict(state["prompts"])
        for name in ("starts", "control_scale", "statistics"):
            part = getattr(self, name)
            if part is not None:
                part.load_state_dict(state[name])

    def _load_best_model(self) -> None:
        self._load_weights(Path(str(self.state.best_model_checkpoint)))

    def _load_weights(self, folder: Path) -> None:
        if self.use_lora:
            self.adapter.load_lora(folder)
        else:
            self.adapter.load_denoiser(folder)
