"""Reading a checkpoint's files safely; which options a resumed run may change, and which state still fits it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from rlr_trainer.estimators.chain import Rollout
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.zeroth_order import Perturbations
from rlr_trainer.persistence.checkpoints import CheckpointError
from rlr_trainer.pipelines import Conditioning, ScaledConditioning
from rlr_trainer.rollouts.batches import Experience
from rlr_trainer.training.config import RLRConfig

logger = logging.getLogger(__name__)

# Classes of this package that torch's safe loader may make; everything else in a file is tensors and plain containers.
ROLLOUT_CLASSES: list[Any] = [Experience, Rollout, PlanDraw, Conditioning, ScaledConditioning, Perturbations]
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
# What may change inside a rollout: nothing of how its samples were made, scored and divided among updates.
CHANGED_WITHIN_ROLLOUT = {
    *("max_grad_norm", "max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "ema_decay", "memory_budget_gb"),
    *("recompute", "log_step_norms", "eval_images_per_prompt", "reward_timeout", "on_reward_error", "reward_workers"),
    *OPTIMIZER_ARGUMENTS,
}
REWARDS = "reward_function"  # an argument, compared like the options by the names of the functions
_ONE_OPTIMIZER = {"adamw_torch", "adamw_torch_fused"}  # the same state


def compared_settings(config: RLRConfig, rewards: list[str]) -> str:
    """What a checkpoint keeps, as JSON, to compare it with the run that resumes it: options, and the names of the rewards."""
    settings = config.rlr_options() | {name: getattr(config, name) for name in COMPARED_ARGUMENTS}
    return json.dumps(settings | {REWARDS: rewards}, default=str)


def compare(stored: str, present: str) -> Changes:
    """What is not as it was, of two `compared_settings`."""
    before = json.loads(stored)
    return {name: (before.get(name), value) for name, value in json.loads(present).items() if before.get(name) != value}


def check_changes(folder: Path, changes: Changes, given_optimizer: bool) -> None:
    """Warns of changed options, and refuses those with which the checkpoint's weights or optimizer cannot be taken up.

    Args:
        folder: the checkpoint.
        changes: see `compare`.
        given_optimizer: whether the optimizer is an object of the user's, and not made of the options.

    Raises:
        CheckpointError: names the option and the way out.
    """
    fixed = [name for name in ("use_lora", "optim") if name in changes and not (name == "optim" and given_optimizer)]
    if "optim" in fixed and set(changes["optim"]) <= _ONE_OPTIMIZER:
        fixed.remove("optim")
    if fixed:
        what = {
            "use_lora": "the checkpoint's weights are of the other kind",
            "optim": "the checkpoint's state is of the other optimizer",
        }
        raise CheckpointError(
            f"cannot resume from {folder} with {_listed(changes, fixed)}: {what[fixed[0]]}; set {fixed[0]}={changes[fixed[0]][0]!r}, or start "
            "a new run from the trained weights"
        )
    applied = [name for name in changes if name not in FREE_OPTIONS and (given_optimizer or name not in OPTIMIZER_ARGUMENTS)]
    if applied:
        logger.warning("resuming %s with other options: %s", folder, _listed(changes, applied))
    kept = [name for name in OPTIMIZER_ARGUMENTS if name in changes and not given_optimizer]
    if kept:
        logger.warning(
            "resuming %s: %s has no effect, because these are part of the optimizer's state: the checkpoint's stay",
            folder,
            _listed(changes, kept),
        )


def check_changes_within_rollout(folder: Path, changes: Changes) -> None:
    """Refuses options other than those that made the rollout in which a checkpoint was saved.

    Raises:
        CheckpointError: names the options.
    """
    refused = [name for name in changes if name not in CHANGED_WITHIN_ROLLOUT | FREE_OPTIONS]
    if refused:
        raise CheckpointError(
            f"cannot resume from {folder} with {_listed(changes, refused)}: it was saved in the middle of a rollout, whose samples were made "
            "with the options before; leave them as they were, or resume from a checkpoint at the end of a rollout"
        )


def fits(own: dict[str, Any], stored: dict[str, Any]) -> bool:
    """Whether lists of one entry per step, or per start, have the same number of entries."""
    return own.keys() == stored.keys() and all(len(own[name]) == len(stored[name]) for name in own)


def _listed(changes: Changes, names: Iterable[str]) -> str:
    return "; ".join(f"{name}={changes[name][0]!r} -> {changes[name][1]!r}" for name in names)


def load_safely(path: Path, allowed: contextlib.AbstractContextManager | None = None, device: str = "cpu") -> Any:
    """Loads tensors, plain containers and the rollout's own classes, and nothing else.

    Args:
        path: of the file.
        allowed: a context in which torch takes other classes than the rollout's.
        device: where tensors go that were not on the CPU; the machine that saved them may have had other devices.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    try:
        with allowed or torch.serialization.safe_globals(ROLLOUT_CLASSES):
            return torch.load(path, map_location=lambda storage, saved: _placed(storage, saved, device), weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the folder is no checkpoint to resume from (save_only_model=True leaves it out)"
        ) from None
    except Exception as error:  # torch reports damage in many ways
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _placed(storage: Any, saved: str, device: str) -> Any:
    return torch.serialization.default_restore_location(storage, "cpu" if saved == "cpu" else device)


def is_plain(value: Any) -> bool:
    """Whether a value is made of what `load_safely` reads: numbers, strings, tensors and containers."""
    if isinstance(value, dict):
        return all(is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)
