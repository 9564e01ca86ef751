"""Pictures of our chain against those of the pipeline's own call."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlr_trainer.pipelines import Layout, PipelineAdapter
from rlr_trainer.rollouts.prompts import PromptRow
from rlr_trainer.testing.case import SEED, Case, Findings, Sampling, call_pipeline, largest_difference, size_in_words
from rlr_trainer.testing.comparable import comparable_options

TOLERANCE = 1e-4  # of pictures in [0, 1]
LEAST_EFFECT = 20 * TOLERANCE  # what a prompt, a scale or another noise must change, or the comparison could not fail
LEAST_TIME_EFFECT = 0.01  # the same for the time that the network is told, as a share of its output
RESCALE = 0.7
MORE_FRAMES = 16  # among which a video model should take another number of frames


@dataclasses.dataclass(frozen=True)
class _Variant:
    """One call that is compared, in words and in arguments."""

    name: str
    rows: Sequence[PromptRow]
    scale: float
    hint: str
    guidance_rescale: float = 0.0


def generation(case: Case, findings: Findings) -> None:
    """The same noise, prompts and guidance give the pictures of the pipeline's own call, and pictures depend on all of them."""
    adapter = case.adapter()
    options, sentence = comparable_options(adapter.pipeline, case.num_steps)
    layout = case.layout(adapter)
    sampling = Sampling(case, adapter, layout, adapter.schedule(layout, options))
    noise = sampling.noise()
    largest, count = 0.0, 0
    for variant in _variants(case, sampling):
        difference = _difference(sampling, variant, noise)
        if _conforms(findings, variant, difference):
            largest, count = max(largest, difference), count + 1
    for other in _other_sizes(case, sampling, options, findings):
        variant = _Variant(
            f"of {size_in_words(other.layout)}", case.rows(case.own_negatives), case.guidance_scale,
            "layout, unpack or the position ids of batch_inputs mix height, width or frames up, or do not follow the size",
        )  # fmt: skip
        difference = _difference(other, variant, other.noise())
        if _conforms(findings, variant, difference):
            largest, count = max(largest, difference), count + 1
    effects = _effects(case, sampling, findings)
    if not findings.problems:
        least = ", ".join(f"{name} {effect:.2g}" for name, effect in effects.items())
        findings.note(
            f"{count} calls equal the pipeline's own to {largest:.1e} (rule: {TOLERANCE:g}), {sentence}; changes of the picture with {least}"
        )


def _variants(case: Case, sampling: Sampling) -> Iterator[_Variant]:
    guided = sampling.adapter.is_guided(case.guidance_scale)
    branches = "encode_negative_prompts; which rows come first in a batched call; guide; the time (`call` gets Schedule.time)"
    plain = (
        "encode_prompts; the scale of the time that `call` hands on; unpack (scaling and shift factor); the schedule's arguments"
    )
    if guided:
        with_own = case.rows(case.own_negatives)
        yield _Variant(
            f"with guidance {case.guidance_scale:g} and a negative prompt per row", with_own, case.guidance_scale, branches
        )
        yield _Variant(
            f"with guidance {case.guidance_scale:g} and the negative prompt {case.negative_prompt!r}", case.rows(), case.guidance_scale,
            'what the pipeline does where no negative prompt is given ("" is not handed to it); ' + branches,
        )  # fmt: skip
    else:
        yield _Variant(
            f"with {sampling.adapter.guidance_argument}={case.guidance_scale:g}, without a second branch", case.rows(),
            case.guidance_scale, "the embedded scale of batch_inputs; is_guided; " + plain,
        )  # fmt: skip
    yield _Variant("with guidance 1", case.rows(), 1.0, plain)
    if guided and sampling.adapter.rescales_guidance:
        yield _Variant(
            f"with guidance_rescale={RESCALE}", case.rows(case.own_negatives), case.guidance_scale, "guide; rescales_guidance", RESCALE
        )  # fmt: skip


def _difference(sampling: Sampling, variant: _Variant, noise: torch.Tensor) -> float:
    arguments: dict[str, Any] = {"guidance_rescale": variant.guidance_rescale} if variant.guidance_rescale else {}
    theirs = sampling.theirs(variant.rows, variant.scale, noise, **arguments)
    return largest_difference(sampling.ours(variant.rows, variant.scale, noise, variant.guidance_rescale), theirs)


def _conforms(findings: Findings, variant: _Variant, difference: float) -> bool:
    problem = f"pictures {variant.name} differ from the pipeline's own by up to {difference:.2g} (rule: at most {TOLERANCE:g})"
    return findings.require(difference <= TOLERANCE, problem, variant.hint)


def _other_sizes(case: Case, sampling: Sampling, options: Any, findings: Findings) -> Iterator[Sampling]:
    """The same at twice the width, and with the next number of frames; without what the adapter refuses or the pipeline itself cannot."""
    adapter = sampling.adapter
    for layout in (_wider(adapter, sampling.layout, findings), _longer(adapter, sampling.layout)):
        if layout is None:
            continue
        try:
            call_pipeline(case, adapter, layout, case.rows(), 1.0)
        except Exception as error:  # whatever stops the pipeline itself is no fault of the adapter
            findings.note(f"the pipeline itself cannot make {size_in_words(layout)} ({type(error).__name__}: {error})")
            continue
        yield Sampling(case, adapter, layout, adapter.schedule(layout, options))


def _wider(adapter: PipelineAdapter, own: Layout, findings: Findings) -> Layout | None:
    try:
        return adapter.layout(own.height, 2 * own.width, own.num_frames)
    except ValueError as error:
        findings.note(f"{own.height} x {2 * own.width} pixels are refused: {error}")
        return None


def _longer(adapter: PipelineAdapter, own: Layout) -> Layout | None:
    """The next number of frames that the adapter takes; None of pictures, and where there is none among the next `MORE_FRAMES`."""
    for more in range(1, 1 + MORE_FRAMES if own.num_frames else 1):
        with contextlib.suppress(ValueError):
            return adapter.layout(own.height, own.width, (own.num_frames or 0) + more)
    return None


def _effects(case: Case, sampling: Sampling, findings: Findings) -> dict[str, float]:
    """How much the pipeline's own picture changes with everything that the comparison is to catch."""
    noise, scale, adapter = sampling.noise(), case.guidance_scale, sampling.adapter
    rows = case.rows()
    own = sampling.theirs(rows, scale, noise)
    turned = [dataclasses.replace(row, prompt=prompt) for row, prompt in zip(rows, case.prompts[::-1], strict=True)]
    others = {
        "the prompt": sampling.theirs(turned, scale, noise),
        "another noise": sampling.theirs(rows, scale, sampling.noise(SEED + 1)),
        "the size of the noise": sampling.theirs(rows, scale, 1.5 * noise),
    }
    if sampling.layout.num_frames is not None and own.shape[1] > 1:
        others["the order of frames"] = own.flip(1)
    if adapter.is_guided(scale):
        others["the guidance scale"] = sampling.theirs(rows, 1.0, noise)
        others["the negative prompt"] = sampling.theirs(case.rows(case.own_negatives), scale, noise)
    elif _differ(adapter.batch_inputs(sampling.layout, scale), adapter.batch_inputs(sampling.layout, 1.0)):
        others["the embedded guidance scale"] = sampling.theirs(rows, 1.0, noise)
    else:
        findings.note("the network takes no guidance scale")
    effects = {name: largest_difference(own, other) for name, other in others.items()}
    chain = sampling.chain(rows, 1.0)
    first = sampling.schedule.time(0)
    last = sampling.schedule.time(case.num_steps - 1) if case.num_steps > 1 else first / 2
    with torch.no_grad():
        at = [adapter.predict(chain.policy, noise, time, chain.conditioning.at(0)) for time in (first, last)]
    share = largest_difference(*at) / float(at[0].abs().max())
    for name, effect, least in [*((*item, LEAST_EFFECT) for item in effects.items()), ("the time", share, LEAST_TIME_EFFECT)]:
        findings.require(
            effect >= least,
            f"the tiny pipeline is degenerate: {name} changes it by {effect:.2g} (rule: at least {least:g}), so a mistake would not show",
            "layers that diffusers initialises with zeros, weights that are too small, or a decoder that saturates: give the output layers "
            "and the modulation layers random weights",
        )
    return effects


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return any(
        not torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value != other[name]
        for name, value in one.items()
    )
