"""What a conformance check is given, and where it puts what it finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlr_trainer.estimators.chain import draw_noise, next_latent, seeded_generator
from rlr_trainer.pipelines import Layout, PipelineAdapter, PipelineChain, Policy
from rlr_trainer.rollouts.prompts import PromptRow
from rlr_trainer.rollouts.sampler import Sampler
from rlr_trainer.schedules import Schedule

SEED = 20250  # of every noise of the kit


class Findings:
    """What a check measured, and what does not conform."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.problems: list[str] = []

    def note(self, text: str) -> None:
        """A figure, or what was left out and why."""
        self.notes.append(text)

    def require(self, holds: bool, problem: str, hint: str) -> bool:
        """Takes down `problem` with its usual cause unless it `holds`; returns `holds`."""
        if not holds:
            self.problems.append(f"{problem}. Usual cause: {hint}")
        return bool(holds)


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of `check_adapter`, see there."""

    make_pipeline: Callable[[], Any]
    make_adapter: Callable[[Any], PipelineAdapter]
    prompts: tuple[str, ...]
    negative_prompt: str
    height: int | None
    width: int | None
    num_frames: int | None
    num_steps: int
    guidance_scale: float
    call_arguments: Mapping[str, Any]
    metadata: tuple[Mapping[str, Any], ...]
    call_conditions: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] | None
    call_negatives: Callable[[Any, Sequence[str]], Mapping[str, Any]] | None
    learning_rate: float
    options: Mapping[str, Any]

    def pipeline(self) -> Any:
        """A fresh pipeline, quiet and without dropout."""
        pipeline = self.make_pipeline()
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def adapter(self) -> PipelineAdapter:
        """The adapter of a fresh pipeline."""
        return self.make_adapter(self.pipeline())

    def layout(self, adapter: PipelineAdapter) -> Layout:
        """The layout of the size asked for."""
        return adapter.layout(self.height, self.width, self.num_frames)

    def rows(self, negatives: Sequence[str] | None = None) -> list[PromptRow]:
        """The prompts with their metadata and negative prompts."""
        negatives = negatives or [self.negative_prompt] * len(self.prompts)
        return [PromptRow(*row) for row in zip(self.prompts, self.metadata, negatives, strict=True)]

    @property
    def own_negatives(self) -> list[str]:
        """A negative prompt for each row: the prompt of the next."""
        return [*self.prompts[1:], self.prompts[0]]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """One way to sample: of an adapter, at a size, with a schedule.

    Attributes:
        case: what is checked.
        adapter: of a pipeline of its own.
        layout: of the samples.
        schedule: made for the layout.
    """

    case: Case
    adapter: PipelineAdapter
    layout: Layout
    schedule: Schedule

    def noise(self, seed: int = SEED) -> Tensor:
        """Standard normal noise of the latents, [N, ...]."""
        generators = [seeded_generator(seed, i) for i in range(len(self.case.prompts))]
        return draw_noise(torch.empty(len(generators), *self.layout.shape), generators)

    def chain(self, rows: Sequence[PromptRow], scale: float, guidance_rescale: float = 0.0) -> PipelineChain:
        """The chain of these rows, as the trainer makes it."""
        policy = Policy(self.adapter.denoiser)
        where = torch.device("cpu")
        sampler = Sampler(self.adapter, policy, self.schedule, self.layout, scale, where, guidance_rescale=guidance_rescale)
        return sampler.chain(policy, sampler.condition(rows))

    def ours(self, rows: Sequence[PromptRow], scale: float, noise: Tensor, guidance_rescale: float = 0.0) -> Tensor:
        """Pictures [N, 3, H, W] (videos [N, F, 3, H, W]) of our chain from `noise`."""
        with torch.no_grad():
            return self.adapter.decode(run_chain(self.chain(rows, scale, guidance_rescale), noise), self.layout)

    def theirs(self, rows: Sequence[PromptRow], scale: float, noise: Tensor, **arguments: Any) -> Tensor:
        """The same of the pipeline's own call from `noise`."""
        return call_pipeline(self.case, self.adapter, self.layout, rows, scale, latents=noise.clone(), **arguments)


def run_chain(chain: PipelineChain, noise: Tensor) -> Tensor:
    """The last latents of the chain from standard normal noise [N, ...], with one generator for the whole batch as pipelines have it."""
    generator, params = torch.Generator().manual_seed(SEED), chain.parameters()
    x = chain.schedule.init_std * noise
    for step in range(chain.num_steps):
        mean, std = chain.transition(step, x, params)
        x = next_latent(mean, std, draw_noise(mean, generator))
    return x


def call_pipeline(
    case: Case,
    adapter: PipelineAdapter,
    layout: Layout,
    rows: Sequence[PromptRow],
    scale: float,
    without: Sequence[str] = (),
    **arguments: Any,
) -> Tensor:
    """Pictures [N, 3, H, W] (videos [N, F, 3, H, W]) of the pipeline's own call, which is given `arguments` too and no argument of `without`.

    Schedulers that add noise get that of `run_chain`, whether they take a generator or draw from torch's own.
    """
    negatives = [row.negative_prompt or "" for row in rows]
    conditions = [row.metadata for row in rows]
    given = {
        "prompt": [row.prompt for row in rows],
        adapter.guidance_argument: scale,
        "num_inference_steps": case.num_steps,
        "height": layout.height,
        "width": layout.width,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(SEED),
    }
    if layout.num_frames is not None:
        given["num_frames"] = layout.num_frames
    if adapter.is_guided(scale) and any(negatives):
        given |= {"negative_prompt": negatives} if case.call_negatives is None else case.call_negatives(adapter.pipeline, negatives)
    if case.call_conditions is not None:
        given |= case.call_conditions(conditions)
    else:
        given |= {name: [row[name] for row in conditions] for name in adapter.conditions}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(SEED)
        given |= dict(case.call_arguments) | arguments
        made = adapter.pipeline(**{name: value for name, value in given.items() if name not in without})
    return made.images if layout.num_frames is None else made.frames


def size_in_words(layout: Layout) -> str:
    """For messages: 5 frames of 16 x 16 pixels."""
    frames = "" if layout.num_frames is None else f"{layout.num_frames} frames of "
    return f"{frames}{layout.height} x {layout.width} pixels"


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference of two tensors; infinite where their shapes differ."""
    return float((one.float() - other.float()).abs().max()) if one.shape == other.shape else float("inf")
