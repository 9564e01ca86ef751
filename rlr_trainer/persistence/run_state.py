"""The state of a run beside weights and optimizer: named parts in one file of a checkpoint; what a resumed run may change."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from rlr_trainer.persistence.checkpoints import CheckpointError

logger = logging.getLogger(__name__)

STATE_FILE = "rlr_state.pt"  # what all processes share
Changes = dict[str, tuple[Any, Any]]  # option -> (the checkpoint's value, the present one)

# Options of TrainingArguments that belong to the optimizer's state: a resumed run goes on with the checkpoint's values.
OPTIMIZER_ARGUMENTS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Options of TrainingArguments that say what is computed.
COMPARED_ARGUMENTS = (
    *("seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "max_steps", "num_train_epochs"),
    *("lr_scheduler_type", "warmup_steps", "optim", "bf16", "fp16", *OPTIMIZER_ARGUMENTS),
)
# Options that say where and when, not what is computed: a resumed run may change them without a word.
FREE_OPTIONS = {"overwrite", "log_estimator_norms", "log_images_steps", "num_log_images", "check_reward", "offload_rollouts"}
_ONE_OPTIMIZER = {"adamw_torch", "adamw_torch_fused"}  # the same state


class Stateful(Protocol):
    """A part of a run that goes on from where it was."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """A part made of two functions, for state that has no object of its own."""

    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], None]


class RunState:
    """The parts of a run by name, saved and taken up together, in this order; `settings` made them, see `compared_settings`."""

    def __init__(self, parts: Mapping[str, Stateful], settings: Callable[[], str]) -> None:
        self.parts, self.settings = parts, settings

    def save(self, folder: Path) -> None:
        """Writes the state of all parts to a checkpoint. A part whose state is more than plain data makes it one to look at only."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        lost = [name for name, state in states.items() if not is_plain(state)]
        for name in lost:
            logger.warning(
                "this checkpoint cannot be resumed: the state of its %s (metadata of prompts drawn ahead, or the prompt function's "
                "state_dict) is not made of numbers, strings, tensors and containers",
                name,
            )
            del states[name]
        torch.save({"settings": self.settings(), "parts": states, "lost": lost}, folder / STATE_FILE)

    def load(self, folder: Path, given_optimizer: bool) -> None:
        """Takes up the state of all parts. `given_optimizer`: whether the optimizer is the user's object, not made of the options.

        Raises:
            CheckpointError: the state is missing, damaged, or does not fit this run.
        """
        state = load_safely(folder / STATE_FILE)
        if not isinstance(state, dict) or not {"settings", "parts", "lost"} <= state.keys():
            raise CheckpointError(
                f"{folder / STATE_FILE} is not of this version of rlr_trainer; start a new run from the trained weights"
            )
        check_changes(folder, compare(state["settings"], self.settings()), given_optimizer)
        if state["lost"]:
            raise CheckpointError(
                f"cannot resume from {folder}: the state of its {state['lost'][0]} could not be stored; let metadata and the prompt function's "
                "state_dict be numbers, strings, tensors and containers"
            )
        for name, part in self.parts.items():
            if name in state["parts"]:  # a run may begin to average, or to keep statistics, here
                part.load_state_dict(state["parts"][name])


def compared_settings(config: Any, trained_on: Mapping[str, Any]) -> str:
    """What a checkpoint keeps, as JSON, to compare it with the run that resumes it: options, and the arguments `trained_on` in words."""
    settings = config.rlr_options() | {name: getattr(config, name) for name in COMPARED_ARGUMENTS}
    return json.dumps(settings | dict(trained_on), default=str)


def compare(stored: str, present: str) -> Changes:
    """What is not as it was, of two `compared_settings`."""
    before = json.loads(stored)
    return {name: (before.get(name), value) for name, value in json.loads(present).items() if before.get(name) != value}


def check_changes(folder: Path, changes: Changes, given_optimizer: bool) -> None:
    """Warns of changed options, and refuses those with which the checkpoint's weights or optimizer cannot be taken up.

    Raises:
        CheckpointError: names the option and the way out.
    """
    fixed = {"use_lora": "weights are of the other kind"}
    if not given_optimizer and not set(changes.get("optim", ())) <= _ONE_OPTIMIZER:
        fixed["optim"] = "state is of the other optimizer"
    for name in fixed.keys() & changes.keys():
        raise CheckpointError(
            f"cannot resume from {folder} with {_listed(changes, [name])}: the checkpoint's {fixed[name]}; set {name}={changes[name][0]!r}, or "
            "start a new run from the trained weights"
        )
    kept = [name for name in OPTIMIZER_ARGUMENTS if name in changes and not given_optimizer]
    applied = [name for name in changes if name not in FREE_OPTIONS and name not in kept]
    if applied:
        logger.warning("resuming %s with other options: %s", folder, _listed(changes, applied))
    if kept:
        logger.warning("resuming %s: %s has no effect: the optimizer goes on with the checkpoint's", folder, _listed(changes, kept))


def _listed(changes: Changes, names: Iterable[str]) -> str:
    return "; ".join(f"{name}={changes[name][0]!r} -> {changes[name][1]!r}" for name in names)


def load_safely(path: Path, allowed: contextlib.AbstractContextManager | None = None) -> Any:
    """Loads tensors and plain containers to the CPU, and nothing else but what torch takes in the context `allowed`.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    try:
        with allowed or contextlib.nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the folder is no checkpoint to resume from (save_only_model=True leaves it out)"
        ) from None
    except Exception as error:  # torch reports damage in many ways
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def is_plain(value: Any) -> bool:
    """Whether a value is made of what `load_safely` reads: numbers, strings, tensors and containers."""
    if isinstance(value, dict):
        return all(is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)


def follow_schedule(scheduler: Any) -> None:
    """Gives a resumed optimizer the rate of this run's schedule, not the one that a shorter run would have gone on with."""
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper has it inside
    if not isinstance(schedule, LambdaLR):
        return
    rates = [rate * factor(schedule.last_epoch) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates  # what get_last_lr, and the log, give


def load_generators_of_main_process(checkpoint: Path, process: int, processes: int) -> None:
    """Restores the global generators where the run had another number of processes, and Trainer finds no file for this one.

    Prompts come from the main process's generators.
    """
    own = f"rng_state_{process}.pth" if processes > 1 else "rng_state.pth"
    others = [path for name in ("rng_state.pth", "rng_state_0.pth") if (path := checkpoint / name).is_file()]
    if not (checkpoint / own).is_file() and others:
        from transformers.trainer import safe_globals

        state = load_safely(others[0], safe_globals())
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002  # as Trainer does
        torch.set_rng_state(state["cpu"])
