"""A stand-in for a pipeline that takes microseconds, and the parts of a trainer on it: no trainer, no text encoder, no VAE."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import accelerate
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler
from torch import Tensor, nn

from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_state import PlanState
from rlr_trainer.pipelines import Layout, PipelineAdapter, Policy
from rlr_trainer.pipelines.old_policy import OldPolicy
from rlr_trainer.pipelines.reference import ReferencePolicy
from rlr_trainer.rewards.interface import Rewards
from rlr_trainer.rollouts.advantage_rule import AdvantageRule
from rlr_trainer.rollouts.collector import Collector, RolloutOptions
from rlr_trainer.rollouts.graph_keeping import GraphKeeping
from rlr_trainer.rollouts.processes import Processes
from rlr_trainer.rollouts.prompts import FunctionPrompts
from rlr_trainer.rollouts.sampler import Sampler
from rlr_trainer.rollouts.scorer import Scorer
from rlr_trainer.schedules import SamplerOptions
from rlr_trainer.training.updater import UpdateOptions, Updater

SHAPE = (3, 2, 2)


class TinyNetwork(nn.Module):
    """Mixes the channels of a latent; the prompt and the time shift them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(0.3 * torch.randn(3, 3, generator=generator))
        self.shift = nn.Parameter(0.1 * torch.randn(3, generator=generator))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        mixed = torch.einsum("ij,njhw->nihw", self.mix, x).tanh()
        return (mixed + (self.shift * prompt + time / 1000)[:, :, None, None],)


class TinyAdapter(PipelineAdapter):
    """Latents [3, 2, 2] are the picture, squashed to [0, 1]; a prompt is the length of its text."""

    lora_targets = ("mix",)

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)))
        self.network, self.asked = TinyNetwork(), []

    @property
    def denoiser(self) -> nn.Module:
        return self.network

    @property
    def frozen_modules(self) -> list[nn.Module]:
        return []

    @property
    def decoder(self) -> nn.Module:
        return nn.Identity()

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        return Layout(SHAPE, 2, 2)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.asked.extend(prompts)
        return {"prompt": torch.tensor([[len(prompt) / 10] for prompt in prompts])}

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        return latents.sigmoid()

    def save_lora(self, directory: Any) -> None:
        raise NotImplementedError

    load_lora = save_lora


@dataclasses.dataclass
class TinyRun:
    """The parts of a trainer, by name."""

    sampler: Sampler
    scorer: Scorer
    collector: Collector
    updater: Updater
    plan_state: PlanState
    processes: Processes

    @property
    def policy(self) -> Policy:
        return self.sampler.policy

    def collect(self, number: int = 0) -> tuple[list[Any], Any]:
        """Rollout `number`, which the updater begins."""
        batches, summary = self.collector.collect(self.policy, number)
        self.updater.begin(batches, summary.valid_fraction)
        return batches, summary

    def gradient(
        self, batches: Sequence[Any], factor: float = -1.0, **how: Any
    ) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """The gradient that an optimizer would get of these micro-batches, and their metrics."""
        params = self.policy.trainable_parameters()
        for parameter in params.values():
            parameter.grad = None

        def backward(surrogate: Tensor, ends_update: bool) -> float:
            (surrogate * factor).backward()
            return factor

        metrics = [self.updater.accumulate(self.policy, batch, backward, factor=factor, **how) for batch in batches]
        metrics.append(self.updater.finish(batches[-1], factor))
        return {name: parameter.grad.clone() for name, parameter in params.items()}, metrics


def processes() -> Processes:
    """One process on a CPU."""
    AcceleratorState._reset_state(True)  # an earlier trainer's precision is kept there
    return Processes(accelerate.Accelerator(cpu=True))


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    """Differentiable."""
    return images.mean((1, 2, 3))


def counted_prompts(count: int = 10) -> Callable[[], tuple[str, Any]]:
    """ "a", "aa", ... with their number as metadata."""
    numbers: Iterator[int] = iter(range(10**6))

    def prompt() -> tuple[str, Any]:
        number = next(numbers) % count
        return "a" * (number + 1), {"number": number}

    return prompt


def tiny_run(
    plan: EstimatorPlan | None = None,
    reward: Any = brightness,
    *,
    prompts: Any = None,
    guidance: float = 1.0,
    advantages: AdvantageRule | None = None,
    batch_size: int = 4,
    num_batches: int = 1,
    group_size: int = 1,
    offload: bool = False,
    eta: float = 1.0,
    first_steps: tuple[int, ...] = (),
    with_reference: bool = False,
    with_old_policy: bool = False,
    rewards: dict[str, Any] | None = None,
    keeping: GraphKeeping | None = None,
    **options: Any,
) -> TinyRun:
    """The parts of a trainer; `options` are those of `UpdateOptions`, `rewards` those of `Rewards`."""
    plan = plan or EstimatorPlan.from_preset("rlr", 4)
    adapter = TinyAdapter()
    layout = adapter.layout(None, None)
    own = processes()
    schedule = adapter.schedule(layout, SamplerOptions(plan.num_steps, eta))
    sampler = Sampler(adapter, Policy(adapter.network), schedule, layout, guidance, torch.device("cpu"), "", first_steps)
    scorer = Scorer(adapter, layout, Rewards(reward, group_size=group_size, **(rewards or {})))
    state = PlanState(plan)
    source = prompts if prompts is not None else FunctionPrompts(counted_prompts())
    reference = None
    if with_reference:
        reference = ReferencePolicy(sampler.policy, False, own.device, torch.float32, own.accelerator.autocast)
    old = OldPolicy(sampler.policy, plan.forward.decay, lambda: False) if plan.forward and with_old_policy else None
    size = RolloutOptions(7, batch_size, num_batches, group_size, offload)
    rule = advantages or AdvantageRule("leave_one_out", group_size=group_size)
    penalized = bool(options.get("kl_coef"))
    shared = sampler, scorer, state, source, own, size, rule, reference, old
    collector = Collector(*shared, keeping=keeping or GraphKeeping(False), penalized=penalized)
    updater = Updater(sampler, scorer, state, own, UpdateOptions(batch_size * num_batches, **options), reference, old)
    return TinyRun(sampler, scorer, collector, updater, state, own)
