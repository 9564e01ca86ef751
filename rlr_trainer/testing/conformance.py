"""`check_adapter`: whether an adapter does what training needs of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlr_trainer.pipelines import PipelineAdapter, adapt
from rlr_trainer.testing import inputs
from rlr_trainer.testing.case import Case, Findings
from rlr_trainer.testing.estimates import checkpointing, gradients, ratio
from rlr_trainer.testing.generation import generation
from rlr_trainer.testing.learning import bf16, raises_reward, resume
from rlr_trainer.testing.weights import lora, whole_network

_CHECKS: dict[str, Callable[[Case, Findings], None]] = {
    "generation": generation,
    "prompts": inputs.prompts,
    "layout": inputs.layout,
    "ratio": ratio,
    "gradients": gradients,
    "lora": lora,
    "checkpointing": checkpointing,
    "bf16": bf16,
    "whole_network": whole_network,
    "resume": resume,
    **{estimator: functools.partial(raises_reward, estimator) for estimator in ("rlr", "ddpo", "draft")},
}
CHECKS: tuple[str, ...] = tuple(_CHECKS)  # names, in order
# those that train; test suites may run them apart
SLOW_CHECKS = frozenset({"bf16", "whole_network", "resume", "rlr", "ddpo", "draft"})
PROMPTS = ("a nine", "the number seven, written in black on white")


class ConformanceError(AssertionError):
    """An adapter does not conform; the message lists every failed check with figures, the rule and the usual cause."""


def check_adapter(
    make_pipeline: Callable[[], Any],
    *,
    make_adapter: Callable[[Any], PipelineAdapter] = adapt,
    prompts: Sequence[str] = PROMPTS,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_steps: int = 4,
    guidance_scale: float = 4.0,
    call_arguments: Mapping[str, Any] | None = None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    call_conditions: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] | None = None,
    call_negatives: Callable[[Any, Sequence[str]], Mapping[str, Any]] | None = None,
    learning_rate: float = 1e-2,
    options: Mapping[str, Any] | None = None,
    checks: Sequence[str] | None = None,
) -> list[str]:
    """Runs the checks on tiny pipelines of real classes and returns what was measured, one line per check.

    Args:
        make_pipeline: makes the pipeline anew, with the same weights each time; small enough that a step takes milliseconds.
        make_adapter: pipeline -> adapter.
        prompts: two or more, of different lengths.
        negative_prompt: of all rows where a check gives none of its own; "" is not handed to the pipeline's call.
        height, width: in pixels; None is the model's own.
        num_frames: of a video; None is the model's own.
        num_steps: T.
        guidance_scale: above 1.
        call_arguments: further arguments of the pipeline's call, which the adapter stands for (`{"max_sequence_length": 16}`).
        metadata: one mapping per prompt, for adapters with `conditions`.
        call_conditions: makes arguments of the pipeline's call of them; by default each condition's list goes under its own name.
        call_negatives: (pipeline, negative prompts) -> arguments of the pipeline's call; by default `negative_prompt`.
        learning_rate: of the checks that train; `ddpo` takes a third of it.
        options: of `RLRConfig`, for the checks that train (`{"noise_steps": 2}`).
        checks: some of `CHECKS`; None runs them all.

    Raises:
        ConformanceError: some checks failed; lists them all.
        ValueError: an unknown check, or arguments that do not fit each other.
    """
    names = CHECKS if checks is None else tuple(checks)
    unknown = [name for name in names if name not in _CHECKS]
    if unknown:
        raise ValueError(f"checks={list(names)}: {', '.join(unknown)} is unknown; must be of {', '.join(CHECKS)}")
    if len(prompts) < 2 or len(set(map(len, prompts))) < 2:
        raise ValueError(f"prompts={list(prompts)}: must be two or more, of different lengths; the checks compare rows of a batch")
    rows = [{} for _ in prompts] if metadata is None else metadata
    if len(rows) != len(prompts):
        raise ValueError(f"metadata has {len(rows)} rows for {len(prompts)} prompts: must have one per prompt")
    case = Case(
        make_pipeline, make_adapter, tuple(prompts), negative_prompt, height, width, num_frames, num_steps, guidance_scale,
        dict(call_arguments or {}), tuple(rows), call_conditions, call_negatives, learning_rate, dict(options or {}),
    )  # fmt: skip
    return _run(names, case)


def _run(names: Sequence[str], case: Case) -> list[str]:
    """Runs every check, also after one that failed; then ConformanceError, if any did."""
    lines, problems, cause = [], [], None
    for name in names:
        findings = Findings()
        try:
            _CHECKS[name](case, findings)
        except Exception as error:  # one check that breaks off leaves the others their say
            findings.problems.append(f"stopped by {type(error).__name__}: {error}")
            cause = cause or error
        problems += [f"- {name}: {problem}" for problem in findings.problems]
        lines.append(f"{name}: {'; '.join(findings.notes)}")
    if problems:
        failed = len({problem.split(":")[0] for problem in problems})
        raise ConformanceError(f"{failed} of {len(names)} checks failed:\n" + "\n".join(problems)) from cause
    return lines
