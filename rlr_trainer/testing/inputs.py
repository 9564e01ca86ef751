"""What the network is given: rows that do not know each other, and latents of the right shape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines import Conditioning, Layout, PipelineAdapter
from rlr_trainer.rollouts.prompts import PromptRow
from rlr_trainer.testing.case import Case, Findings, Sampling, call_pipeline, largest_difference, size_in_words
from rlr_trainer.testing.comparable import comparable_options

TOLERANCE = 1e-4  # of the network's output, which is of order 1
TOO_MANY_FRAMES = 8
FRAMES_HINT = "`layout` does not check the number of frames; let `video_size` do it"


def prompts(case: Case, findings: Findings) -> None:
    """A row of a batch gives the network's output that it gives alone, whatever prompts are beside it, and after joining and selecting."""
    adapter = case.adapter()
    layout = case.layout(adapter)
    sampling = Sampling(case, adapter, layout, adapter.schedule(layout, comparable_options(adapter.pipeline, case.num_steps)[0]))
    noise, largest = sampling.noise(), 0.0
    for scale in (case.guidance_scale, 1.0):
        rows = case.rows(case.own_negatives if adapter.is_guided(scale) else None)
        for name, difference in _routes(sampling, rows, scale, noise).items():
            largest = max(largest, difference)
            findings.require(
                difference <= TOLERANCE,
                f"with guidance {scale:g}, the network's output of rows {name} differs from that of each alone by {difference:.2g} "
                f"(rule: at most {TOLERANCE:g})",
                "padding up to the longest prompt of the batch without a mask among the rows; an encoder that mixes rows; what belongs to the "
                "batch (batch_inputs) among the rows, or the other way round",
            )
    findings.note(
        f"rows encoded together, joined and selected give the output of each alone to {largest:.1e} (rule: {TOLERANCE:g})"
    )


def _routes(sampling: Sampling, rows: Sequence[PromptRow], scale: float, noise: Tensor) -> dict[str, float]:
    """Difference of the network's output from that of each row alone, by how the rows came into a batch."""
    adapter, count = sampling.adapter, len(rows)
    policy, time = sampling.chain(rows, scale).policy, sampling.schedule.time(0)

    def output(conditioning: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return adapter.predict(policy, x, time, conditioning)

    together = sampling.chain(rows, scale).conditioning
    alone: list[Any] = [sampling.chain([row], scale).conditioning for row in rows]
    one_by_one = torch.cat([output(own, noise[i : i + 1]) for i, own in enumerate(alone)])
    selected = [output(together.select(torch.tensor([i])), noise[i : i + 1]) for i in range(count)]
    routes = {
        "encoded together": output(together, noise),
        "encoded alone and joined": output(Conditioning.concatenate(alone), noise),
        "selected of a batch": torch.cat(selected),
    }
    return {name: largest_difference(found, one_by_one) for name, found in routes.items()}


def layout(case: Case, findings: Findings) -> None:
    """The layout is what the pipeline samples, at its own size too, and sizes that do not fit are refused."""
    adapter = case.adapter()
    own_size: dict[str, int | None] = {"height": case.height, "width": case.width, "num_frames": case.num_frames}
    asked: dict[str, dict[str, int | None]] = {"default size": dict.fromkeys(own_size)}
    if own_size != asked["default size"]:
        asked["size asked for"] = own_size
    for name, given_size in asked.items():
        ours = adapter.layout(**given_size)
        size = {key: value for key, value in given_size.items() if value is not None}
        theirs = _prepared(case, adapter, ours, size, None)
        given = _prepared(case, adapter, ours, size, torch.zeros(len(case.prompts), *ours.shape))
        findings.require(
            given == theirs,
            f"{name}: the pipeline prepares latents of shape {list(theirs)} by itself, but {list(given)} of ours, {list(ours.shape)} per sample",
            "the default size, the VAE's factor or the packing in `layout`; the shape must be what the call's `latents` takes",
        )
        findings.note(f"{name}: {size_in_words(ours)} are latents {list(ours.shape)}")
    own = case.layout(adapter)
    _refused(
        findings,
        "height one pixel more",
        f"height={own.height + 1}",
        lambda: adapter.layout(own.height + 1, own.width, own.num_frames),
    )
    _refused(
        findings,
        "width one pixel more",
        f"width={own.width + 1}",
        lambda: adapter.layout(own.height, own.width + 1, own.num_frames),
    )
    if own.num_frames is None:
        many = TOO_MANY_FRAMES
        _refused(findings, "frames of a picture", f"num_frames={many}", lambda: adapter.layout(None, None, many))
    else:
        _frames(case, adapter, own, findings)
    if not findings.problems:
        findings.note("1 pixel more is refused")


def _frames(case: Case, adapter: PipelineAdapter, own: Layout, findings: Findings) -> None:
    """No frames are refused; one frame more is refused, or both the pipeline and our decoder make it."""
    _refused(findings, "no frames", "num_frames=0", lambda: adapter.layout(own.height, own.width, 0))
    more = (own.num_frames or 0) + 1
    try:
        longer = adapter.layout(own.height, own.width, more)
    except ValueError as error:
        findings.require(
            f"num_frames={more}" in str(error), f"the ValueError does not name num_frames={more}: {error}", FRAMES_HINT
        )
        findings.note(f"{more} frames are refused")
        return
    with torch.no_grad():
        ours = adapter.decode(torch.zeros(1, *longer.shape), longer)
    theirs = call_pipeline(case, adapter, longer, case.rows(), 1.0)
    for name, pictures in (("the pipeline's call makes", theirs), ("decode makes", ours)):
        found = pictures.shape[1]
        findings.require(found == more, f"num_frames={more} is taken, but {name} {found} frames", FRAMES_HINT)


def _refused(findings: Findings, what: str, named: str, ask: Callable[[], Layout]) -> None:
    hint = "`layout` does not check; let `picture_size` do it"
    try:
        found = ask()
    except ValueError as error:
        findings.require(named in str(error), f"{what}: the ValueError does not name {named}: {error}", hint)
        return
    findings.require(False, f"{what} ({named}) is not refused with a ValueError, but makes {found}", hint)


class _Prepared(Exception):
    """Leaves the pipeline's call as soon as the latents are there."""


def _prepared(case: Case, adapter: PipelineAdapter, ours: Layout, size: dict[str, int], latents: Tensor | None) -> tuple[int, ...]:
    """Shape of the latents with which the pipeline's own call begins."""
    shapes: list[tuple[int, ...]] = []
    missing = [name for name in ("height", "width", "num_frames") if name not in size]
    with _stopping_at_latents(adapter.pipeline, shapes), contextlib.suppress(_Prepared):
        call_pipeline(case, adapter, ours, case.rows(), 1.0, without=missing, latents=latents)
    return shapes[0]


@contextlib.contextmanager
def _stopping_at_latents(pipeline: Any, shapes: list[tuple[int, ...]]) -> Iterator[None]:
    """Within, the pipeline's call takes down the shape of its latents and stops."""
    prepare = pipeline.prepare_latents

    def stop(*args: Any, **kwargs: Any) -> Any:
        made = prepare(*args, **kwargs)
        shapes.append(tuple((made[0] if isinstance(made, tuple) else made).shape))
        raise _Prepared

    pipeline.prepare_latents = stop
    try:
        yield
    finally:
        del pipeline.prepare_latents
