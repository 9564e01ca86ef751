"""One update: the gradient of its micro-batches, the zeroth-order part, and what is taken down of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlr_trainer.estimators.advantages import Advantages
from rlr_trainer.estimators.chain import to_device
from rlr_trainer.estimators.divergence import Penalty
from rlr_trainer.estimators.forward_process import Matching, MatchingResult
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_state import PlanState
from rlr_trainer.estimators.prediction import FP16_LOSS_SCALE
from rlr_trainer.estimators.sweep import Feedback, Sweep, SweepResult
from rlr_trainer.estimators.zeroth_order import zeroth_order
from rlr_trainer.pipelines import PipelineChain
from rlr_trainer.pipelines.old_policy import OldPolicy
from rlr_trainer.pipelines.reference import ReferencePolicy
from rlr_trainer.rollouts.batches import ScoredBatch
from rlr_trainer.rollouts.processes import Processes
from rlr_trainer.rollouts.sampler import Sampler
from rlr_trainer.rollouts.scorer import Scorer
from rlr_trainer.training.meters import GradientMeter, squared_norms

logger = logging.getLogger(__name__)

# (surrogate of one backward pass, whether it ends the update) -> what the gradients were multiplied by
Backward = Callable[[Tensor, bool], float]
# (steps of one backward pass, whether it is the micro-batch's last) -> its context
Scope = Callable[[list[int], bool], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class UpdateOptions:
    """How an update is computed.

    Attributes:
        samples: of one update, per process.
        clip_range: of the ratio, once the weights are not those that sampled; None is unclipped.
        advantage_limit: of the advantage's magnitude, for losses on the forward process.
        kl_coef: weight of the divergence from the reference policy; None or 0 for none.
        recompute: see `Sweep`.
        half_precision: fp16, where rewards of predictions get a loss scale.
        measure_parts, measure_steps: take down the gradient norm of every part, and of every step.
    """

    samples: int
    clip_range: float | None = None
    advantage_limit: float | None = None
    kl_coef: float | None = None
    recompute: str = "recursive"
    half_precision: bool = False
    measure_parts: bool = True
    measure_steps: bool = False


class Updater:
    """Accumulates the gradient of updates. For every rollout `begin`, for every micro-batch `accumulate`, after the last of an update `finish`.

    `sampler` makes the chain of a batch, `scorer` scores one-step predictions; the starts of `plan_state` learn from updates.
    """

    def __init__(
        self,
        sampler: Sampler,
        scorer: Scorer,
        plan_state: PlanState,
        processes: Processes,
        options: UpdateOptions,
        reference: ReferencePolicy | None = None,
        old_policy: OldPolicy | None = None,
    ) -> None:
        self.sampler, self.scorer, self.plan_state, self.processes = sampler, scorer, plan_state, processes
        self.options, self.reference, self.old_policy = options, reference, old_policy
        self._params: Mapping[str, nn.Parameter] = sampler.policy.trainable_parameters()
        self._meter = GradientMeter(self._params)
        self._zeroth: dict[str, Tensor] = {}
        self._valid_fraction = 1.0
        self._is_first = True

    @property
    def plan(self) -> EstimatorPlan:
        return self.plan_state.plan

    @property
    def _share(self) -> float:
        """Weight of one sample: 1 / samples with a reward. DDP averages over processes, Trainer sums micro-batches."""
        return 1.0 / (self.options.samples * self._valid_fraction)

    @property
    def _needs_step_norms(self) -> bool:
        return self.options.measure_steps or self.plan_state.starts is not None

    def begin(self, batches: Sequence[ScoredBatch], valid_fraction: float) -> None:
        """Takes a rollout: the share of its samples that have a reward, and the zeroth-order part, over all processes."""
        self._valid_fraction = valid_fraction
        self._zeroth = {}
        share = self._share * self.plan.rest_weight
        for batch in batches:
            if batch.perturbations is not None and batch.zeroth_advantage is not None:
                terms = zeroth_order(batch.zeroth_advantage * share, batch.draw.zeroth, batch.perturbations, self._params)
                for name, term in terms.items():
                    self._zeroth[name] = self._zeroth.get(name, torch.zeros_like(term)) + term
        reduce = self.processes.accelerator.reduce
        self._zeroth = {name: reduce(term, reduction="mean") for name, term in self._zeroth.items()}

    def accumulate(
        self,
        model: nn.Module,
        batch: ScoredBatch,
        backward: Backward,
        factor: float = 1.0,
        on_policy: bool = True,
        ends_update: bool = True,
    ) -> dict[str, float]:
        """Adds the gradient of a micro-batch to that of the update.

        Args:
            model: the policy as Trainer wrapped it.
            backward: differentiates a surrogate, which ascends the reward.
            factor: what `backward` multiplies gradients by.
            on_policy: whether the weights are still those that sampled. Then a ratio differs from 1 by rounding alone, which over a small
                noise may exceed the clip range: nothing is clipped.
            ends_update: whether the update's last backward pass is here; distributed wrappers synchronize there.

        Returns:
            Metrics of the micro-batch: `loss`, and the ratios where steps are scored.
        """
        chain = self.sampler.chain(model, batch.conditioning, batch.schedule)
        clip_range = None if on_policy else self.options.clip_range
        is_first_order: list[bool] = batch.draw.first_order.any(0).tolist()
        ends = ends_update  # whether the present backward pass ends the update

        def scope(steps: list[int], is_last: bool) -> contextlib.AbstractContextManager:
            nonlocal ends
            ends = is_last and ends_update
            part = "forward" if self.plan.forward else "fo" if is_first_order[steps[-1]] else "ho"
            return self._one_pass(model, steps[0], part, factor, ends)

        def differentiate(surrogate: Tensor) -> float:
            return backward(_with_graph(surrogate), ends)

        if self.plan.forward is not None:
            return self._metrics(batch, self._matching(chain, differentiate, scope, on_policy, batch), clip_range)
        sweep = Sweep.of_plan(
            self.plan,
            chain,
            chain.parameters(),
            differentiate,
            self.scorer.differentiable(batch.prompts, batch.metadata),
            reward_loss_scale=FP16_LOSS_SCALE if self.options.half_precision else 1.0,
            scope=scope,
            recompute=self.options.recompute,
            clip_range=clip_range,
            mean_density=True,
        )
        result = sweep.run(batch.rollout, batch.draw, self._feedback(chain, batch), batch.kept)
        return self._metrics(batch, result, clip_range)

    @contextlib.contextmanager
    def _one_pass(self, model: nn.Module, step: int, part: str, factor: float, ends: bool) -> Iterator[None]:
        """Around a backward pass: its gradient is measured, and exchanged between processes only where it `ends` the update."""
        with contextlib.ExitStack() as stack:
            if not ends:
                stack.enter_context(self.processes.accelerator.no_sync(model))
            if self.options.measure_parts:
                stack.enter_context(self._meter.measuring(step if self._needs_step_norms else None, part, factor))
            yield

    def _matching(
        self, chain: PipelineChain, backward: Callable[[Tensor], float], scope: Scope, on_policy: bool, batch: ScoredBatch
    ) -> MatchingResult:
        """The gradient of a loss on the forward process, of a micro-batch."""
        forward, old, live, limit = self.plan.forward, self.old_policy, chain.parameters(), self.options.advantage_limit
        assert forward is not None and batch.noise_seeds is not None
        matching = Matching(
            forward,
            chain.forward_schedule,
            lambda step, x: chain.output(step, x, live),
            None if old is None or (on_policy and not forward.averages) else old.output_of(chain),
            backward,
            scope,
            1.0 if limit is None else limit,
            None if on_policy else self.options.clip_range,
        )
        share = torch.where(batch.scale == 0, 0.0, self._share)  # without a reward a sample says nothing
        return matching.run(batch.rollout.sample, batch.draw.forward, batch.advantage, share, batch.noise_seeds)

    def finish(self, batch: ScoredBatch, factor: float = 1.0, where: str = "the update") -> dict[str, float]:
        """Completes the update after its last micro-batch, `batch`: adds the zeroth-order part, times `factor`, to `.grad`.

        Returns metrics: gradient norms of the parts and, if asked for, of the steps; the start of the sub-chain.

        Raises:
            FloatingPointError: the norm of the whole gradient is not finite.
            ValueError: in the first update no gradient reached the LoRA weights, though the samples differ in their rewards.
        """
        if self._is_first and self._has_signal(batch):
            # LoRA's B starts at 0, so that its A has no gradient in the first update: B alone tells
            present = self.sampler.policy.trainable_parameters()  # FSDP has exchanged them since the construction
            check_lora({name: p for name, p in present.items() if ".lora_B." in name}, strict=not self.options.half_precision)
            self._is_first = False
        norms = self._meter.part_norms()
        if self._zeroth:
            for name, term in self._zeroth.items():
                gradient = self._params[name].grad
                self._params[name].grad = factor * term if gradient is None else gradient.add_(term, alpha=factor)
            norms["zo"] = sum(squared_norms(self._zeroth)) ** 0.5
            self._zeroth = {}
        if abs(factor) == 1:  # with a loss scale an overflow is usual: the scaler skips the update and lowers the scale
            check_norm(self.sampler.policy.trainable_parameters(), where)
        metrics = {f"estimator/{part}_grad_norm": norm for part, norm in norms.items()}
        if self.options.measure_steps:
            metrics |= {f"estimator/step_grad_norm/{step}": norm for step, norm in self._meter.step_norms().items()}
        start = int(batch.draw.start[0])
        if start >= 0:
            metrics["estimator/subchain_start"] = float(start)
        if self.plan_state.starts is not None:
            square = sum(n**2 for s, n in self._meter.step_norms().items() if start <= s < start + self.plan.ho_length)
            # each process measures its own samples' gradient; all must draw the next start from the same distribution
            mean = self.processes.accelerator.reduce(torch.tensor(square, device=self.processes.device), reduction="mean")
            self.plan_state.starts.update(start, float(mean) ** 0.5)
        self._meter.reset()
        return metrics

    def reset(self) -> None:
        """Forgets an update that was begun."""
        self._zeroth = {}
        self._meter.reset()

    def _has_signal(self, batch: ScoredBatch) -> bool:
        """Whether the rewards of a micro-batch ask for any change by backward passes."""
        gradient = batch.reward_gradient
        if self.plan.forward is not None:
            return bool((batch.advantage.abs() > 1e-5).any())  # NFT's r rounds much smaller ones to one half
        scored = bool(batch.draw.score.any()) and bool(batch.advantage.any())
        return scored or (self.plan.fo_range[0] > 0 and gradient is not None and bool(gradient.any()))

    def _feedback(self, chain: PipelineChain, batch: ScoredBatch) -> Feedback:
        penalty = None
        if self.reference is not None and self.options.kl_coef and batch.divergence_to_go is not None:
            # of all samples, rewarded or not
            weight = torch.full_like(batch.scale, self.options.kl_coef * self._share * self._valid_fraction)
            penalty = Penalty(self.reference.steps_of(chain), weight, batch.divergence_to_go)
        return Feedback.of(
            self.plan,
            Advantages(batch.advantage, batch.scale),
            self._share,
            reward_gradient=batch.reward_gradient,
            control=batch.control,
            penalty=penalty,
        )

    def _metrics(self, batch: ScoredBatch, result: SweepResult | MatchingResult, clip_range: float | None) -> dict[str, float]:
        numbers: dict[str, Tensor] = {"objective": result.scored, "divergence": torch.as_tensor(result.divergence)}
        if result.log_ratios:
            ratio = torch.stack(list(result.log_ratios.values())).exp()  # [scored steps, B]
            deviation = (ratio - 1).abs()
            numbers["ratio/mean"], numbers["ratio/max_abs_dev"] = ratio.mean(), deviation.max()
            numbers["clip_ratio"] = (deviation > clip_range).float().mean() if clip_range else torch.zeros(())
        # one question to the device for all of them
        told = torch.stack([to_device(number, self.processes.device) for number in numbers.values()]).tolist()
        metrics = dict(zip(numbers, told, strict=True))
        objective = metrics.pop("objective") + metrics.pop("divergence")
        if self.plan.fo_range[1] > 0:
            objective += float(batch.rewards.nansum()) * self._share
        return {"loss": -objective * self.options.samples / len(batch), **metrics}  # as if the micro-batch were the whole update


def _with_graph(surrogate: Tensor) -> Tensor:
    if not surrogate.requires_grad:
        raise ValueError(
            "no trained weight takes part in the network's output, so nothing can be learnt; choose lora_target_modules that the denoising "
            "network uses in its forward pass"
        )
    return surrogate


def check_lora(weights: Mapping[str, nn.Parameter], strict: bool) -> None:
    """Looks for LoRA weights that no gradient reaches.

    Args:
        weights: the B of every LoRA layer, after a backward pass from a signal that is not 0.
        strict: whether gradients that are all 0 are an error; not in fp16, where they may be too small.

    Raises:
        ValueError: all of them are dead. Where only some are, that is logged.
    """
    whole = {name: p for name, p in weights.items() if not isinstance(p, DTensor)}  # of a shard nothing can be told
    dead = [name.split(".lora_B.")[0] for name, p in whole.items() if p.grad is None or not bool(p.grad.any())]
    if dead and len(dead) == len(whole) and strict:
        raise ValueError(
            f"no gradient reached any of the {len(dead)} LoRA layers ({dead[0]}, ...), so they would stay 0; choose lora_target_modules that "
            "the network uses in its forward pass, and look whether the reward's gradient is 0"
        )
    if dead:
        logger.warning("%d of %d LoRA layers got no gradient, and stay 0: %s", len(dead), len(whole), ", ".join(dead[:4]))


def check_norm(params: Mapping[str, nn.Parameter], where: str) -> None:
    """Refuses a gradient whose norm is not finite: clipped by it every entry would be 0 or NaN, and Adam's squares would stay infinite.

    Raises:
        FloatingPointError: names the norm and what to do.
    """
    gradients = [parameter.grad for parameter in params.values() if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)  # a shard's with FSDP
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"{where}: the norm of the gradient is {norm}, so nothing can be learnt from it; bring the reward and its gradient to a size "
            "near 1, or use a wider precision"
        )
