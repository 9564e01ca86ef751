"""Log lines as text: one compact line per update, per evaluation and at the end. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlr_trainer.persistence.metric_names import EVAL_REWARD

CLOSING = "train_runtime"  # is in the line that Trainer logs when training ends, and in no other
# Metrics of an update's line, after the reward and the gradient, where they are logged: name -> the word before them.
SHOWN = {"kl": "kl", "eval_reward": "eval", "noise_window": "window"}


def line_of(logs: Mapping[str, Any], step: int, max_steps: int, seconds: float | None = None) -> str:
    """One line of what was logged after `step` of `max_steps` updates; metrics.jsonl has the rest.

    Args:
        logs: metric -> value.
        seconds: of one update since the last line; None: not known.
    """
    if CLOSING in logs:
        return f"trained {step} updates in {duration(float(logs[CLOSING]))}"
    if "reward" in logs or "loss" in logs:
        return _update(logs, step, max_steps, seconds)
    if any(map(EVAL_REWARD.fullmatch, logs)):
        return f"after {step} updates: {_evaluation(logs)}"
    return f"after {step} updates: " + ", ".join(f"{name} {_value(value)}" for name, value in logs.items() if name != "epoch")


def _update(logs: Mapping[str, Any], step: int, max_steps: int, seconds: float | None) -> str:
    parts = [f"update {step:>{len(str(max_steps))}}/{max_steps}"]
    if "reward" in logs:
        parts.append(f"reward {with_deviation(logs['reward'], logs.get('reward_std'))}")
    if "grad_norm" in logs:
        parts.append(f"gradient {_value(logs['grad_norm'], 3)}")
    parts += [f"{word} {_value(logs[name], 3)}" for name, word in SHOWN.items() if name in logs]
    if "learning_rate" in logs:
        parts.append(f"lr {_value(logs['learning_rate'], 3)}")
    parts += [
        f"{logs[name]:g} {word}"
        for name, word in (("samples_dropped", "dropped"), ("reward_errors", "reward errors"))
        if logs.get(name)
    ]
    if seconds is not None:
        parts.append(duration(seconds))
    return "  ".join(parts)


def _evaluation(logs: Mapping[str, Any]) -> str:
    names = [name for name in logs if EVAL_REWARD.fullmatch(name)]
    return ", ".join(f"{name} {with_deviation(logs[name], logs.get(f'{name}_std'))}" for name in names)


def with_deviation(mean: Any, deviation: Any) -> str:
    """`0.1234 ± 0.0567`: a mean and the standard deviation of single values."""
    return _value(mean) + ("" if deviation is None else f" ± {_value(deviation, 3)}")


def duration(seconds: float) -> str:
    """`0.42 s`, `12 s`, `2 min 5 s`, `3 h 20 min`."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _value(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
