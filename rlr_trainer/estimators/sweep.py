"""The estimators of a plan, composed: one sweep back along the stored chain gives the sum of all differentiated parts.

Going back from the sample, each step is rerun from its stored latent and differentiated once. Its local surrogate is the sum of

    score      * likelihood_ratio(A, ...)       half-order: at the end of a sub-chain, and on single "lr" steps
    score      * ratio * prediction_pathwise(alpha g, ...)   what a control variate took off that A, added back
    prediction * prediction_pathwise(g, ...)    through the one-step prediction
    -weight * gaussian_divergence(...)          from a reference policy, where there is a penalty
    pathwise(adjoint, ...)                      first-order steps, and the inside of a sub-chain

and the gradient with respect to the step's input is the adjoint that the step before receives. So memory is that of one step
for any K and h. `recompute="graph"` builds the graph of a whole first-order suffix or sub-chain instead: the same gradient for
the parameters that sampled, in memory that grows with K and h. (Off-policy they differ: this one replays from the first stored latent.)
Steps whose graphs were kept from sampling (`KeptSteps`) are not run again: the same gradient, in memory that grows with the number of
visited steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.advantages import Advantages
from rlr_trainer.estimators.chain import DenoisingChain, Parameters, Rollout, as_rows, next_latent
from rlr_trainer.estimators.divergence import Penalty, gaussian_divergence
from rlr_trainer.estimators.first_order import pathwise
from rlr_trainer.estimators.half_order import is_clipped, likelihood_ratio
from rlr_trainer.estimators.kept_steps import KeptSteps
from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.prediction import ControlVariate, Critic, check_prediction, prediction_critic, prediction_pathwise

RECOMPUTE_MODES = ("recursive", "graph")


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What the rewards say about one rollout, already weighted: fold 1/N, the normalization and fo_weight into it.

    Attributes:
        advantage: [N].
        reward_gradient: [N, ...], dR/dx_0 times the same factors; None when the plan needs none.
        scale: [N], the factor between a raw reward and `advantage`; weighs the one-step prediction's terms.
        control: the control variate's terms, of the raw reward; None without one.
        penalty: on the divergence from a reference policy; every step with noise is then visited.
    """

    advantage: Tensor
    reward_gradient: Tensor | None = None
    scale: Tensor | None = None
    control: ControlVariate | None = None
    penalty: Penalty | None = None

    @classmethod
    def of(
        cls,
        plan: EstimatorPlan,
        advantages: Advantages,
        share: float,
        *,
        reward_gradient: Tensor | None = None,
        control: ControlVariate | None = None,
        penalty: Penalty | None = None,
    ) -> Feedback:
        """What the rewards of a batch of N say under `plan`, whose `fo_weight` counts.

        `share` is the weight of one sample, 1 / number of samples with a reward. `reward_gradient` is dR/dx_0 [N, ...] of the plain
        reward; it does not count where `advantages.scale` is 0.
        """
        scale = advantages.scale * share
        if reward_gradient is not None:
            factor, weighted = as_rows(scale, reward_gradient), plan.fo_weight * reward_gradient
            reward_gradient = torch.where(factor == 0, 0.0, weighted * factor)  # without a reward it may be NaN
        return cls(advantages.values * share, reward_gradient, scale, control, penalty)


@dataclasses.dataclass
class SweepResult:
    """What a sweep saw.

    Attributes:
        surrogates: step -> advantage * ratio (clipped) [N] of every scored step, before the plan's weights.
        divergence: the penalty's part of the objective, summed over steps and samples: -weight * divergence. 0 without one.
        log_ratios: step -> log-ratio [N] of every scored step (all rows; those with weight 0 too).
        adjoint: gradient of the whole surrogate with respect to the first latent touched, [N, ...] or None.
    """

    surrogates: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    divergence: Tensor | float = 0.0
    log_ratios: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    adjoint: Tensor | None = None

    @property
    def scored(self) -> Tensor:
        """The mean over scored steps of the summed surrogates: with the penalty's part, the objective. First order has no value to add."""
        values = list(self.surrogates.values())
        return torch.stack(values).sum(1).mean() if values else torch.zeros(())


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How to go back along a chain; `run` does it.

    Attributes:
        chain, params: the chain and its live parameters, into whose `.grad` the estimate is accumulated.
        backward: differentiates a scalar surrogate; returns the factor it multiplied the gradient by (a sign, a loss scale).
        scope: context of a forward and backward pass, given its steps and whether it is the sweep's last (where a distributed wrapper
            synchronizes gradients).
        recompute: "recursive" or "graph".
        critic: c and g for the terms of the one-step prediction; None where the plan has none.
        clip_range, mean_density: see `likelihood_ratio`.
    """

    chain: DenoisingChain
    params: Parameters
    backward: Callable[[Tensor], float]
    scope: Callable[[list[int], bool], AbstractContextManager] = lambda steps, is_last: contextlib.nullcontext()
    recompute: str = "recursive"
    critic: Critic | None = None
    clip_range: float | None = None
    mean_density: bool = False

    @classmethod
    def of_plan(
        cls,
        plan: EstimatorPlan,
        chain: DenoisingChain,
        params: Parameters,
        backward: Callable[[Tensor], float],
        reward: Callable[[Tensor], Tensor],
        *,
        reward_loss_scale: float = 1.0,
        **how: Any,
    ) -> Sweep:
        """The sweep of a plan, with the one-step prediction where the plan asks it.

        `reward` (final latents [N, ...] -> [N], differentiable) is called for predictions alone, with the loss scale of
        `prediction_critic`; `how` sets other attributes.
        """
        asks = plan.rest_estimator == "prediction"
        critic = prediction_critic(chain, params, reward, reward_loss_scale) if asks else None
        return cls(chain, params, backward, critic=critic, **how)

    def run(self, rollout: Rollout, draw: PlanDraw, feedback: Feedback, kept: KeptSteps | None = None) -> SweepResult:
        """Accumulates the gradient of the whole surrogate, summed over the batch.

        `kept` are the graphs of all visited steps, from the sampling of this rollout under the present parameters; they are used up.

        Raises:
            FloatingPointError: an adjoint is not finite; names the step.
            ValueError: first-order steps without `feedback.reward_gradient`; a visited step is not among the `kept` ones.
        """
        if self.recompute not in RECOMPUTE_MODES:
            raise ValueError(f"recompute={self.recompute!r}: must be one of {RECOMPUTE_MODES}")
        if draw.first_order.any() and feedback.reward_gradient is None:
            raise ValueError("the plan has first-order steps but feedback.reward_gradient is None")
        if kept is not None and self.recompute != "recursive":
            raise ValueError(f"recompute={self.recompute!r} with kept steps: each has a graph of its own; use 'recursive'")
        return _Run(self, rollout, draw, feedback, kept).back()


class _Run:
    """One run of a sweep."""

    def __init__(self, sweep: Sweep, rollout: Rollout, draw: PlanDraw, feedback: Feedback, kept: KeptSteps | None = None) -> None:
        self.sweep, self.rollout, self.draw, self.feedback, self.kept = sweep, rollout, draw, feedback, kept
        self.result = SweepResult()
        # asked of the device, or brought to it, once and for all steps: a step by itself would make the host wait for the device
        device = rollout.sample.device
        self.has_noise: list[bool] = torch.stack([(std > 0).all() for std in rollout.stds]).tolist()
        self.is_pathwise, self.is_scored, self.asks = (
            mask.any(0).tolist() for mask in (draw.pathwise, draw.score != 0, draw.prediction != 0)
        )
        self.pathwise_rows, self.score, self.prediction = (t.to(device) for t in (draw.pathwise, draw.score, draw.prediction))
        self._finite: dict[int, Tensor] = {}  # step -> whether the adjoint of its input is

    def back(self) -> SweepResult:
        """Differentiates every block, the last steps first."""
        blocks = self._blocks()
        for number, block in enumerate(blocks):
            with self.sweep.scope(block, number == len(blocks) - 1):
                self._differentiate(block)
        self._check_adjoints()
        return self.result

    def _blocks(self) -> list[list[int]]:
        """Runs of consecutive steps differentiated in one graph, last first: single steps when recursive."""
        blocks: list[list[int]] = []
        for step in reversed(self.draw.visited_steps([] if self.feedback.penalty is None else self.has_noise)):
            is_linked = bool(blocks) and blocks[-1][0] == step + 1 and self.is_pathwise[step]
            if is_linked and self.sweep.recompute == "graph":
                blocks[-1].insert(0, step)
            else:
                blocks.append([step])
        return blocks

    def _differentiate(self, block: list[int]) -> None:
        rollout, first, last = self.rollout, block[0], block[-1]
        # The adjoint matters to the step before only if that step is pathwise for some row, and not already in this block.
        carries = first > 0 and self.is_pathwise[first - 1]
        adjoint = self.feedback.reward_gradient if last == rollout.num_steps - 1 else self.result.adjoint
        # before the block's own graph is there: decoder, reward and the network's call for the prediction then have the memory alone
        predictions = {step: self._predict(step) for step in block}
        kept = None if self.kept is None else self.kept.take(first)
        start = rollout.latents[first].detach().requires_grad_(carries) if kept is None else kept.x
        x, total = start, torch.zeros((), device=start.device, dtype=start.dtype)
        for step in block:
            mean, std = kept[1:] if kept is not None else self.sweep.chain.transition(step, x, self.sweep.params)
            total = total + self._local_surrogate(step, mean, std, predictions[step])
            if self.feedback.penalty is not None and self.has_noise[step]:
                total = total - self._penalty(self.feedback.penalty, step, x, mean, std)
            rows = as_rows(self.pathwise_rows[:, step], x)
            if step < last:
                x = torch.where(rows > 0, next_latent(mean, std, rollout.noises[step]), rollout.latents[step + 1])
            elif adjoint is not None and self.is_pathwise[step]:
                total = total + pathwise(adjoint * rows, mean, std, rollout.noises[step]).sum()
        factor = self.sweep.backward(total)
        self.result.adjoint = None
        if carries:
            assert start.grad is not None
            self.result.adjoint = start.grad / factor
            if factor in (1, -1):  # a loss scale may overflow: the scaler then skips the update
                self._finite[first] = torch.isfinite(self.result.adjoint).all()

    def _check_adjoints(self) -> None:
        """Refuses adjoints that are not finite; the first of them on the way back is named."""
        if not self._finite:
            return
        for step, finite in zip(self._finite, torch.stack(list(self._finite.values())).tolist(), strict=True):
            if not finite:
                raise FloatingPointError(
                    f"step {step}: the adjoint, shape {tuple(self.rollout.latents[step].shape)}, has non-finite values; shorten fo_steps or "
                    "ho_length, or use a wider precision"
                )

    def _penalty(self, penalty: Penalty, step: int, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Weighted divergence from the reference policy at x, summed over the batch."""
        with torch.set_grad_enabled(x.requires_grad):  # its parameters are not trained, but its input may carry the adjoint
            reference = penalty.reference(step, x)
        weighted = (penalty.weight * gaussian_divergence(mean, std, *reference)).sum()
        self.result.divergence = self.result.divergence - weighted.detach()
        return weighted

    def _predict(self, step: int) -> Tensor | None:
        """g [N, ...] at the output of a step; None if the step does not ask. 0 for samples without a reward."""
        if not self.asks[step]:
            return None
        if self.sweep.critic is None or self.feedback.scale is None:
            raise ValueError("the plan asks the one-step prediction: it needs a critic and feedback.scale")
        value, gradient = self.sweep.critic(step + 1, self.rollout.latents[step + 1])
        has_reward = self.feedback.scale != 0  # without one, the prediction's may be NaN as well, and counts for nothing
        gradient = torch.where(as_rows(has_reward, gradient) > 0, gradient, 0.0)
        check_prediction(step, torch.where(has_reward, value, 0.0), gradient)
        return gradient

    def _local_surrogate(self, step: int, mean: Tensor, std: Tensor, predicted: Tensor | None) -> Tensor:
        """Score and prediction terms of one step, summed over the batch."""
        feedback, total = self.feedback, torch.zeros((), device=mean.device, dtype=mean.dtype)
        if predicted is not None:
            assert feedback.scale is not None
            weighted = predicted * as_rows(self.prediction[:, step].to(mean) * feedback.scale, predicted)
            total = prediction_pathwise(weighted, mean, std, self.rollout.noises[step]).sum()
        return total + self._scored(step, mean, std) if self.is_scored[step] else total

    def _scored(self, step: int, mean: Tensor, std: Tensor) -> Tensor:
        """The likelihood-ratio term of one step, and what the control variate adds back, summed over the batch."""
        sweep, rollout, feedback, control = self.sweep, self.rollout, self.feedback, self.feedback.control
        if not self.has_noise[step]:
            raise PlanError(
                f"step {step} adds no noise (std = 0), so it has no likelihood ratio; cover it by first order (fo_steps)"
            )
        advantage, score = feedback.advantage, self.score[:, step].to(mean)
        if feedback.penalty is not None:
            advantage = advantage - feedback.penalty.weight * feedback.penalty.to_go[:, step]
        if control is not None:
            assert feedback.scale is not None
            advantage = advantage - control.baseline[:, step] * feedback.scale
        x_next, old = rollout.latents[step + 1], (rollout.means[step], rollout.stds[step])
        options: dict[str, Any] = {"clip_range": sweep.clip_range, "mean_density": sweep.mean_density}
        surrogate, log_ratio = likelihood_ratio(advantage, x_next, mean, std, *old, **options)
        self.result.log_ratios[step] = log_ratio
        self.result.surrogates[step] = surrogate.detach() / (mean[0].numel() if sweep.mean_density else 1)
        if control is not None and step in control.gradients:
            surrogate = surrogate + self._added_back(control.gradients[step], advantage, log_ratio.exp(), x_next, mean, std)
        return (score * surrogate).sum()

    def _added_back(self, gradient: Tensor, advantage: Tensor, ratio: Tensor, x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """What the control variate took off the advantage, pathwise: [N].

        The ratio weights it as it weights the score, and the noise is the one with which the present policy would make `x_next`: so both
        expectations are those of one distribution, also when the weights are not those that sampled.
        """
        assert self.feedback.scale is not None
        weight = torch.where(is_clipped(advantage, ratio, self.sweep.clip_range), 0.0, ratio) * self.feedback.scale
        noise = ((x_next - mean) / std).detach()
        return prediction_pathwise(gradient * as_rows(weight, gradient), mean, std, noise)
