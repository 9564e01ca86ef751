"""What a run leaves on disk: weights, state, settings, model card; and how it is read back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlr_trainer import checkpoints, compat
from rlr_trainer.averaging import WeightAverage
from rlr_trainer.chain import Rollout
from rlr_trainer.checkpoints import CheckpointError
from rlr_trainer.config import RLRConfig
from rlr_trainer.estimators.advantages import PerPromptStatistics
from rlr_trainer.estimators.prediction import ControlVariateScale
from rlr_trainer.estimators.zeroth_order import Perturbations
from rlr_trainer.experience import Experience
from rlr_trainer.microbatches import MicroBatches
from rlr_trainer.model_card import write_model_card
from rlr_trainer.pipelines import Conditioning, PipelineAdapter, Policy, ScaledConditioning
from rlr_trainer.plan import EstimatorPlan, PlanDraw, StartDistribution
from rlr_trainer.processes import of_main_process
from rlr_trainer.prompts import DatasetPrompts, FunctionPrompts
from rlr_trainer.rewards.interface import Rewards
from rlr_trainer.sharding import spread_when_loaded, whole_weights

logger = logging.getLogger(__name__)

STATE_FILE = "rlr_state.pt"  # what all processes share
ROLLOUT_FILE = "rlr_rollout_{}.pt"  # the micro-batches that a process has not used yet
AVERAGE_FOLDER = "average"  # the averaged weights of a checkpoint
CONFIG_FILE = "rlr_config.json"
RUN_MARKS = ("checkpoint-*", "metrics.jsonl", "*.safetensors", "model_index.json")  # files that say that a run lives here
# Classes of this package that torch's safe loader may make; everything else in a file is tensors and plain containers.
ROLLOUT_CLASSES: list[Any] = [Experience, Rollout, PlanDraw, Conditioning, ScaledConditioning, Perturbations]
# Options of TrainingArguments that say what is computed.
COMPARED_ARGUMENTS = (
    *("seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "max_steps", "num_train_epochs"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("bf16", "fp16"),
)
STATEFUL = ("starts", "control_scale", "statistics")
# Options that say where and when, not what is computed: a resumed run may change them without a word.
FREE_OPTIONS = {"overwrite", "log_estimator_norms", "log_images_steps", "num_log_images", "check_reward", "offload_rollouts"}


class SavingTrainer(compat.BaseTrainer):
    """The part of `RLRTrainer` that saves and loads."""

    args: RLRConfig
    model: nn.Module
    policy: Policy
    adapter: PipelineAdapter
    plan: EstimatorPlan
    use_lora: bool
    rewards: Rewards
    prompts: FunctionPrompts | DatasetPrompts
    starts: StartDistribution | None
    control_scale: ControlVariateScale | None
    statistics: PerPromptStatistics | None
    average: WeightAverage | None
    _metrics: dict[str, list[float]]
    eval_queries: int  # pictures scored outside training, over all processes
    _queue: MicroBatches
    _rollouts_done: int
    _valid_fraction: float
    _chosen: dict[str, int]
    _writing_to: Path | None = None

    def _set_plan(self, **chosen: int) -> None:
        raise NotImplementedError

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside it the policy has its averaged weights (`ema_decay`); without averaging nothing changes."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    # ---- weights and model card ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained weights, from the main process; every process must call it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        with whole_weights(self.adapter.denoiser):
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # newer versions of transformers call this on every process
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name.startswith("checkpoint-"):  # what training goes on with
            self._save_weights(folder)
            if self.average is not None:
                (folder / AVERAGE_FOLDER).mkdir(exist_ok=True)
                with self.averaged_weights():
                    self._save_weights(folder / AVERAGE_FOLDER)
        else:
            with self.averaged_weights():
                if self.use_lora:
                    self.adapter.save_lora(folder)
                else:
                    self.adapter.pipeline.save_pretrained(folder)
        (folder / CONFIG_FILE).write_text(json.dumps(self.args.rlr_options(), indent=2, default=str))

    def _save_weights(self, folder: Path) -> None:
        if self.use_lora:
            self.adapter.save_lora(folder)
        else:
            self.adapter.save_denoiser(folder)

    def _load_weights(self, folder: Path) -> None:
        load = self.adapter.load_lora if self.use_lora else self.adapter.load_denoiser
        if self.average is None:
            with spread_when_loaded(self.adapter.denoiser):
                load(folder)
            return
        has_average = (folder / AVERAGE_FOLDER).is_dir()  # not if it is a checkpoint of a run without averaging
        load(folder / AVERAGE_FOLDER if has_average else folder)
        self.average.take_present_weights(self.average.updates)
        load(folder)

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

    # ---- the output folder ----

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

    # ---- writing a checkpoint ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing_to is None else str(self._writing_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint aside and renames it when it is whole, so that a kill leaves the one before it usable.

        Raises:
            OSError: it cannot be written (a full disk); nothing half written is left.
        """
        run_folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        written = checkpoints.aside(run_folder, self.state.global_step)
        if self.args.should_save:
            run_folder.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_aside(run_folder)
        self.accelerator.wait_for_everyone()
        with self._cleaned_up(written, run_folder / name):
            self._writing_to = written
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to = None
            self.accelerator.wait_for_everyone()
            self._name_best_checkpoint(run_folder, written / name)
            if self.args.should_save:
                checkpoints.seal(written / name)
                checkpoints.publish(written / name, run_folder / name)
                written.rmdir()
                checkpoints.rotate(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))

    @contextlib.contextmanager
    def _cleaned_up(self, written: Path, final: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # torch and safetensors report a full disk as errors of their own kinds
            shutil.rmtree(written, ignore_errors=True)
            complete = [folder.name for folder in checkpoints.list_checkpoints(final.parent)]
            free = shutil.disk_usage(final.parent).free if final.parent.is_dir() else 0
            raise OSError(
                f"cannot write {final} ({error}); {free / 1e9:.3g} GB are free there. "
                + (f"The run can go on from {complete[-1]}" if complete else "No checkpoint was written before")
                + "; make room, set save_total_limit, or choose another output_dir"
            ) from error

    def _name_best_checkpoint(self, run_folder: Path, written: Path) -> None:
        """Trainer looks for the best checkpoint beside the one it writes: gives it the place where it is, or will be."""
        best = self.state.best_global_step if self.args.save_strategy != "no" else None
        if not best:
            return
        folder = run_folder / f"checkpoint-{best}"
        if folder.is_dir() or best == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        if self.args.should_save:
            self.state.save_to_json(str(written / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writing_to is not None:  # a push reads the folder while training goes on: it must have its name by then
            return
        self.save_model(self.args.output_dir, _internal_call=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        if self._queue:
            torch.save(self._pending(), folder / ROLLOUT_FILE.format(self.args.process_index))
        if not self.is_world_process_zero():
            return
        state = {
            "rollouts_done": self._rollouts_done,
            "pending": len(self._queue),
            "processes": self.accelerator.num_processes,
            "valid_fraction": self._valid_fraction,
            "reward_queries": self.rewards.queries * self.accelerator.num_processes,
            "eval_reward_queries": self.eval_queries,
            "metrics": {name: list(values) for name, values in self._metrics.items()},
            "prompts": self._prompt_state(),
            "chosen": dict(self._chosen),  # in place of "auto"
            "options": json.dumps(self._compared_options(), default=str),
            "averaged_updates": self.average.updates if self.average is not None else None,
        }
        state |= {name: getattr(self, name).state_dict() for name in STATEFUL if getattr(self, name) is not None}
        torch.save(state, folder / STATE_FILE)

    def _compared_options(self) -> dict[str, Any]:
        return self.args.rlr_options() | {name: getattr(self.args, name) for name in COMPARED_ARGUMENTS}

    def _prompt_state(self) -> dict[str, Any] | None:
        state = self.prompts.state_dict()
        if _is_plain(state):
            return state
        logger.warning(
            "this checkpoint cannot be resumed: the prompts' state (metadata of prompts drawn ahead, or the prompt function's state_dict) is "
            "not made of numbers, strings, tensors and containers"
        )
        return None

    def _pending(self) -> dict[str, Any]:
        """The micro-batches left of the rollout. Metadata goes with them only where the sweep calls the reward again."""
        state = self._queue.state()
        if not self.plan.uses_prediction:
            state["parts"] = [part and dataclasses.replace(part, metadata=({},) * len(part)) for part in state["parts"]]
            return state
        unsafe = next((m for part in state["parts"] if part for m in part.metadata if not _is_plain(m)), None)
        if unsafe is None:
            return state
        logger.warning(
            "metadata %s... is not made of numbers, strings and containers, so this checkpoint, inside a rollout, cannot hold it and "
            "cannot be resumed; save at multiples of %d updates (save_steps)",
            str(unsafe)[:60],
            self.args.updates_per_rollout,
        )
        return {"parts": [], "rows": [], "sizes": []}

    # ---- reading it back ----

    def _checkpoint_to_resume(self, asked: str | bool | Path) -> Path:
        """The checkpoint folder that `resume_from_checkpoint` means, found and checked by the main process for all.

        Raises:
            CheckpointError: there is none, or it is incomplete or damaged; names the file.
        """
        answer: str | CheckpointError | None = None
        if self.is_world_process_zero():
            try:
                folder = checkpoints.last_complete(Path(self.args.output_dir)) if isinstance(asked, bool) else Path(asked)
                if not isinstance(asked, bool):
                    checkpoints.check(folder)
                answer = str(folder)
            except CheckpointError as error:
                answer = error
        answer = of_main_process(answer, self.accelerator)
        if isinstance(answer, CheckpointError):
            raise answer
        return Path(str(answer))

    def _load_run_state(self, folder: Path) -> None:
        """Takes up everything but weights, optimizer and the global random number generators, which Trainer restores.

        Raises:
            CheckpointError: the state is missing, damaged, or does not fit this run.
        """
        state = _load_safely(folder / STATE_FILE)
        options = json.loads(state["options"])
        present = json.loads(json.dumps(self._compared_options(), default=str))
        changed = [
            f"{name}={options.get(name)!r} -> {value!r}"
            for name, value in present.items()
            if options.get(name) != value and name not in FREE_OPTIONS
        ]
        if changed:
            logger.warning("resuming %s with other options: %s", folder, "; ".join(changed))
        self._set_plan(**state["chosen"])  # the run goes on with what was chosen at its start
        processes = self.accelerator.num_processes
        self._rollouts_done = state["rollouts_done"]
        self._valid_fraction = state["valid_fraction"]
        self.rewards.queries = state["reward_queries"] // processes
        self.eval_queries = state["eval_reward_queries"]
        if state["prompts"] is None:
            raise CheckpointError(
                f"cannot resume from {folder}: the state of its prompts could not be stored; let metadata and the prompt function's state_dict "
                "be numbers, strings, tensors and containers"
            )
        self.prompts.load_state_dict(state["prompts"])
        self._metrics.clear()
        self._metrics.update(state["metrics"])
        for name in STATEFUL:
            if getattr(self, name) is not None and name in state:
                getattr(self, name).load_state_dict(state[name])
        if self.average is not None:
            self.average.take_present_weights(state["averaged_updates"] or 0)
        self._queue.clear()
        if state["pending"]:
            self._queue.fill(**self._load_pending(folder, state))

    def _load_pending(self, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        processes, size = self.accelerator.num_processes, self.args.per_device_train_batch_size
        if state["processes"] != processes:
            raise CheckpointError(
                f"cannot resume from {folder}: it was saved in the middle of a rollout by {state['processes']} processes, and this is a run of "
                f"{processes}; resume with as many, or from a checkpoint at a multiple of {self.args.updates_per_rollout} updates"
            )
        pending = _load_safely(folder / ROLLOUT_FILE.format(self.args.process_index))
        if len(pending["rows"]) != state["pending"]:
            raise CheckpointError(
                f"cannot resume from {folder}: it was saved in the middle of a rollout whose metadata could not be stored; resume from a "
                f"checkpoint at a multiple of {self.args.updates_per_rollout} updates"
            )
        if any(len(rows) != size for rows in pending["rows"]):
            raise CheckpointError(
                f"cannot resume from {folder}: it was saved in the middle of a rollout with per_device_train_batch_size="
                f"{len(pending['rows'][0])}, and this run has {size}; resume with the same, or from a checkpoint at the end of a rollout"
            )
        return pending

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_weights(Path(str(self.state.best_model_checkpoint)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        # With another number of processes Trainer finds no file for this one; prompts come from the main process's generators.
        own = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        others = [path for name in ("rng_state.pth", "rng_state_0.pth") if (path := Path(checkpoint) / name).is_file()]
        if not (Path(checkpoint) / own).is_file() and others:
            state = _load_safely(others[0], compat.rng_globals())
            random.setstate(state["python"])
            np.random.set_state(state["numpy"])  # noqa: NPY002  # as Trainer does
            torch.set_rng_state(state["cpu"])


def _load_safely(path: Path, allowed: contextlib.AbstractContextManager | None = None) -> Any:
    """Loads tensors, plain containers and the rollout's own classes, and nothing else.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    try:
        with allowed or torch.serialization.safe_globals(ROLLOUT_CLASSES):
            return torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the folder is no checkpoint to resume from (save_only_model=True leaves it out)"
        ) from None
    except Exception as error:  # torch reports damage in many ways
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)
