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
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from rlr_trainer.estimators.advantages import PerPromptStatistics
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import StartDistribution
from rlr_trainer.estimators.prediction import ControlVariateScale
from rlr_trainer.persistence import checkpoints
from rlr_trainer.persistence import run_state as resuming
from rlr_trainer.persistence.checkpoints import CheckpointError
from rlr_trainer.persistence.hub import PushingTrainer
from rlr_trainer.persistence.model_card import write_model_card
from rlr_trainer.persistence.run_state import is_plain, load_safely
from rlr_trainer.pipelines import PipelineAdapter, Policy
from rlr_trainer.pipelines.average import WeightAverage
from rlr_trainer.pipelines.sharding import spread_when_loaded, whole_weights
from rlr_trainer.rewards.interface import Rewards
from rlr_trainer.rollouts.micro_batches import MicroBatches
from rlr_trainer.rollouts.processes import of_main_process
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts
from rlr_trainer.training.config import AUTO, RLRConfig
from rlr_trainer.training.interruption import StopOnTermination
from rlr_trainer.training.trl import compat

logger = logging.getLogger(__name__)

STATE_FILE = "rlr_state.pt"  # what all processes share
ROLLOUT_FILE = "rlr_rollout_{}.pt"  # the micro-batches that a process has not used yet
AVERAGE_FOLDER = "average"  # the averaged weights of a checkpoint
CONFIG_FILE = "rlr_config.json"
RUN_MARKS = ("checkpoint-*", "metrics.jsonl", "*.safetensors", "model_index.json")  # files that say that a run lives here
STATEFUL = ("starts", "control_scale", "statistics")


class SavingTrainer(PushingTrainer):
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
    termination: StopOnTermination
    _metrics: dict[str, list[float]]
    eval_queries: int  # pictures scored outside training, over all processes
    _queue: MicroBatches
    _rollouts_done: int
    _valid_fraction: float
    _chosen: dict[str, int]
    _resumed_at = 0  # updates that the checkpoint had which this run goes on from

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
        if self._writing_to is not None:  # a checkpoint: what training goes on with
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
        """Refuses an `output_dir` that holds another run, unless `overwrite` is set; `train` calls it first, on every process.

        Raises:
            ValueError: the folder holds a run.
        """
        problem = None
        if self.is_world_process_zero() and (found := self._found_in_output_folder()):
            folder = Path(self.args.output_dir)
            if self.args.overwrite:
                self._remove_checkpoints()
            elif self.state.global_step == 0:
                problem = (
                    f"output_dir={str(folder)!r} holds another run ({found}): choose another folder, continue it with "
                    "train(resume_from_checkpoint=True), or allow overwriting with overwrite=True (--overwrite)"
                )
            else:
                logger.warning(
                    "training anew with the same trainer: the logs in %s begin anew, and its checkpoints are replaced", folder
                )
        problem = of_main_process(problem, self.accelerator)
        if problem is not None:
            raise ValueError(problem)

    def _found_in_output_folder(self) -> str:
        """What says that a run lives in `output_dir`; empty if nothing does."""
        folder = Path(self.args.output_dir)
        found = [path.name for mark in RUN_MARKS for path in sorted(folder.glob(mark))] if folder.is_dir() else []
        return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")

    def _remove_checkpoints(self) -> None:
        for folder in checkpoints.list_checkpoints(Path(self.args.output_dir)):  # or a later resume would take up the other run
            logger.warning("overwrite=True: removing %s of an earlier run", folder)
            checkpoints.remove(folder)

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
            self._writing_to, weights_alone = written, self.args.save_only_model
            self.args.save_only_model = weights_alone and not self.termination.stopped  # one to leave with can be resumed
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to, self.args.save_only_model = None, weights_alone
            self.accelerator.wait_for_everyone()
            self._name_best_checkpoint(run_folder, written / name)
            if self.args.should_save:
                checkpoints.seal(written / name)
                checkpoints.publish(written / name, run_folder / name)
                checkpoints.remove_aside(run_folder)
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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """With save_strategy="best" Trainer saves if this is true: a run that leaves saves whatever the evaluation says."""
        return super()._determine_best_metric(metrics, trial) or self.termination.stopped

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
            "options": resuming.compared_settings(self.args, self.rewards.names),
            "averaged_updates": self.average.updates if self.average is not None else None,
        }
        state |= {name: getattr(self, name).state_dict() for name in STATEFUL if getattr(self, name) is not None}
        torch.save(state, folder / STATE_FILE)

    def _prompt_state(self) -> dict[str, Any] | None:
        state = self.prompts.state_dict()
        if is_plain(state):
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
        unsafe = next((m for part in state["parts"] if part for m in part.metadata if not is_plain(m)), None)
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
                    self._check_folder_to_go_on_in(folder)
                answer = str(folder)
            except CheckpointError as error:
                answer = error
        answer = of_main_process(answer, self.accelerator)
        if isinstance(answer, CheckpointError):
            raise answer
        return Path(str(answer))

    def _check_folder_to_go_on_in(self, checkpoint: Path) -> None:
        """Refuses to go on from another run's checkpoint in a folder that holds a run: its logs would be cut and mixed.

        Raises:
            CheckpointError: `output_dir` holds a run, the checkpoint is not in it, and `overwrite` is not set.
        """
        folder, found = Path(self.args.output_dir), self._found_in_output_folder()
        if not found or checkpoint.resolve().is_relative_to(folder.resolve()):
            return
        if not self.args.overwrite:
            raise CheckpointError(
                f"cannot go on from {checkpoint} in output_dir={str(folder)!r}, which holds another run ({found}): choose another folder, "
                "continue that run with resume_from_checkpoint=True, or allow overwriting with overwrite=True (--overwrite)"
            )
        self._remove_checkpoints()

    def _load_run_state(self, folder: Path) -> None:
        """Takes up everything but weights, optimizer and the global random number generators, which Trainer restores.

        Raises:
            CheckpointError: the state is missing, damaged, or does not fit this run.
        """
        state = load_safely(folder / STATE_FILE)
        changes = resuming.compare(state["options"], resuming.compared_settings(self.args, self.rewards.names))
        resuming.check_changes(folder, changes, given_optimizer=self.optimizer is not None)
        # the run goes on with what was chosen at its start
        self._set_plan(**{name: value for name, value in state["chosen"].items() if getattr(self.args, name) == AUTO})
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
            self._take_up(name, state)
        if self.average is not None:
            self.average.take_present_weights(state["averaged_updates"] or 0)
        self._queue.clear()
        if state["pending"]:
            self._queue.fill(**self._load_pending(folder, state, changes))
        self._resumed_at = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step

    def _take_up(self, name: str, state: dict[str, Any]) -> None:
        part = getattr(self, name)
        if part is None or name not in state:
            return
        if name == "statistics" or resuming.fits(part.state_dict(), state[name]):
            part.load_state_dict(state[name])
        else:
            what = {"starts": "the norms that ho_start='grad_norm' draws by", "control_scale": "the scale of the control variate"}
            logger.warning("%s: the checkpoint has it for another chain or sub-chain, so it is learned anew", what[name])

    def set_initial_training_values(self, *arguments: Any, **keywords: Any) -> Any:
        """Trainer's; without an epoch left where a run is resumed that has all its updates: Trainer would do one more."""
        values: Any = super().set_initial_training_values(*arguments, **keywords)
        epochs, updates_per_epoch, max_steps = values[0], values[1], values[-1]
        if self._resumed_at < max_steps:
            return values
        logger.warning("nothing is left to train: %d updates are done, and %d were asked for", self._resumed_at, max_steps)
        return min(epochs, self._resumed_at // updates_per_epoch), *values[1:]

    def _load_pending(self, folder: Path, state: dict[str, Any], changes: resuming.Changes) -> dict[str, Any]:
        processes, size = self.accelerator.num_processes, self.args.per_device_train_batch_size
        if state["processes"] != processes:
            raise CheckpointError(
                f"cannot resume from {folder}: it was saved in the middle of a rollout by {state['processes']} processes, and this is a run of "
                f"{processes}; resume with as many, or from a checkpoint at a multiple of {self.args.updates_per_rollout} updates"
            )
        device = str(self.accelerator.device)
        pending = load_safely(folder / ROLLOUT_FILE.format(self.args.process_index), device=device)
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
        resuming.check_changes_within_rollout(folder, changes)
        if not self.args.offload_rollouts:  # it may have been set when the rollout was saved
            pending["parts"] = [part and part.to(device) for part in pending["parts"]]
        return pending

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_weights(Path(str(self.state.best_model_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's; and the first update has the rate of this run's schedule, not the one that a shorter run would have gone on with."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate's wrapper has it inside
        if checkpoint is not None and isinstance(schedule, LambdaLR):
            pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            rates = [rate * factor(schedule.last_epoch) for rate, factor in pairs]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates  # what get_last_lr, and the log, give

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        # With another number of processes Trainer finds no file for this one; prompts come from the main process's generators.
        own = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        others = [path for name in ("rng_state.pth", "rng_state_0.pth") if (path := Path(checkpoint) / name).is_file()]
        if not (Path(checkpoint) / own).is_file() and others:
            state = load_safely(others[0], compat.rng_globals())
            random.setstate(state["python"])
            np.random.set_state(state["numpy"])  # noqa: NPY002  # as Trainer does
            torch.set_rng_state(state["cpu"])
