"""When a run saves and makes pictures, where nobody has said it."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import IntervalStrategy

MOST = 100  # updates between two
SHARE = 4  # of a short run


def default_steps(updates: int, multiple: int = 1) -> int:
    """Updates between two checkpoints, or sets of pictures, of a run of so many: a quarter of them, 100 at most.

    Rounded up to a multiple of `multiple`.
    """
    steps = min(MOST, max(1, -(-updates // SHARE)))
    return -(-steps // multiple) * multiple


def save_steps_of(args: Any, updates: int) -> int:
    """`default_steps` of a run with these options; with the best model in mind a multiple of eval_steps, as Trainer asks for."""
    evaluates = args.load_best_model_at_end and args.eval_strategy == IntervalStrategy.STEPS
    return default_steps(updates, max(1, int(args.eval_steps)) if evaluates else 1)
