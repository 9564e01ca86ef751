"""The estimators of a plan, composed: one sweep back along the stored chain gives the sum of all differentiated parts.

Going back from the sample, each step is rerun from its stored latent and differentiated once. Its local surrogate is the sum of

    score      * likelihood_ratio(A, ...)       half-order: at the end of a sub-chain, and on single "lr" steps
    prediction * prediction_pathwise(g, ...)    through the one-step prediction
    -weight * gaussian_divergence(...)          from a reference policy, where there is a penalty
    pathwise(adjoint, ...)                      first-order steps, and the inside of a sub-chain

and the gradient with respect to the step's input is the adjoint that the step before receives. So memory is that of one step
for any K and h. `recompute="graph"` builds the graph of a whole first-order suffix or sub-chain instead: the same gradient for
the parameters that sampled, in memory that grows with K and h. (Off-policy the two differ: this one replays the chain from
its first stored latent, the recursive one takes each step at its stored latent.)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.advantages import Advantages
from rlr_trainer.estimators.chain import DenoisingChain, Parameters, Rollout, next_latent
from rlr_trainer.estimators.divergence import Penalty, gaussian_divergence
from rlr_trainer.estimators.first_order import pathwise
from rlr_trainer.estimators.half_order import likelihood_ratio
from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.prediction import (
    ControlVariateScale,
    Critic,
    control_variate,
    leave_one_out_mean,
    prediction_critic,
    prediction_pathwise,
)

RECOMPUTE_MODES = ("recursive", "graph")


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What the rewards say about one rollout, already weighted: fold 1/N, the normalization and fo_weight into it.

    Attributes:
        advantage: [N].
        reward_gradient: [N, ...], dR/dx_0 times the same factors; None when the plan needs none.
        scale: [N], the factor between a raw reward and `advantage`; weighs the one-step prediction's terms.
        blocks: int [N]; samples with the same number share their noise (antithetic pairs), and the control variate's centre leaves
            them out together. None: every sample has its own.
        penalty: on the divergence from a reference policy; every step is then visited.
    """

    advantage: Tensor
    reward_gradient: Tensor | None = None
    scale: Tensor | None = None
    blocks: Tensor | None = None
    penalty: Penalty | None = None

    @classmethod
    def of(
        cls,
        plan: EstimatorPlan,
        advantages: Advantages,
        share: float,
        *,
        reward_gradient: Tensor | None = None,
        blocks: Tensor | None = None,
        penalty: Penalty | None = None,
    ) -> Feedback:
        """What the rewards of a batch say under `plan`.

        Args:
            plan: whose `fo_weight` counts.
            advantages: of the N samples.
            share: weight of one sample in the estimate: 1 / number of samples with a reward.
            reward_gradient: dR/dx_0 [N, ...] of the plain reward; not counted where `advantages.scale` is 0.
            blocks, penalty: as they are.
        """
        scale = advantages.scale * share
        if reward_gradient is not None:
            weighted = plan.fo_weight * reward_gradient * _rows(scale, reward_gradient)
            reward_gradient = torch.where(_rows(scale, weighted) == 0, 0.0, weighted)  # without a reward it may be NaN
        return cls(advantages.values * share, reward_gradient, scale, blocks, penalty)


@dataclasses.dataclass
class SweepResult:
    """What a sweep saw.

    Attributes:
        surrogates: step -> advantage * ratio, clipped where the sweep clips, [N] of every scored step, before the plan's weights.
        divergence: the penalty's part of the objective, summed over steps and samples: -weight * divergence. 0 without one.
        log_ratios: step -> log-ratio [N] of every scored step (all rows; those with weight 0 too).
        critic_values: step -> c [N] of every step that asked the one-step prediction.
        adjoint: gradient of the whole surrogate with respect to the first latent touched, [N, ...] or None.
    """

    surrogates: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    divergence: Tensor | float = 0.0
    log_ratios: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    critic_values: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    adjoint: Tensor | None = None

    @property
    def objective(self) -> float:
        """The value of the surrogate objective on this batch: the mean over scored steps of the summed surrogates, plus the penalty's part.

        The first-order part has no value of its own to add: its reward is that of the rollout, whatever the parameters are.
        """
        scored = torch.stack(list(self.surrogates.values())).sum(1).mean() if self.surrogates else 0.0
        return float(scored) + float(self.divergence)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How to go back along a chain; `run` does it.

    Attributes:
        chain, params: the chain and its live parameters, into whose `.grad` the estimate is accumulated.
        backward: differentiates a scalar surrogate; returns the factor it multiplied the gradient by (a sign, a loss scale).
        scope: context of one forward and backward pass, given its steps and whether it is the last of the sweep (a distributed
            wrapper synchronizes gradients only there; a meter attributes gradients to steps).
        recompute: "recursive" or "graph".
        critic: c and g for control variate and prediction terms.
        control_scale: factor on c per step; None: no control variate.
        clip_range, mean_density: see `likelihood_ratio`.
    """

    chain: DenoisingChain
    params: Parameters
    backward: Callable[[Tensor], float]
    scope: Callable[[list[int], bool], AbstractContextManager] = lambda steps, is_last: contextlib.nullcontext()
    recompute: str = "recursive"
    critic: Critic | None = None
    control_scale: ControlVariateScale | None = None
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
        control_scale: ControlVariateScale | None = None,
        reward_loss_scale: float = 1.0,
        **how: Any,
    ) -> Sweep:
        """The sweep of a plan, with the one-step prediction where the plan asks it.

        Args:
            plan: the plan.
            chain, params, backward: see the class.
            reward: final latents [N, ...] -> rewards [N], differentiable; called only for predictions.
            control_scale: fitted factors of the control variate; None takes 1 where the plan has one.
            reward_loss_scale: see `prediction_critic`.
            how: the other attributes.
        """
        critic = prediction_critic(chain, params, reward, reward_loss_scale) if plan.uses_prediction else None
        if plan.uses_control_variate and control_scale is None:
            control_scale = ControlVariateScale(plan.num_steps)
        return cls(
            chain, params, backward, critic=critic, control_scale=control_scale if plan.uses_control_variate else None, **how
        )

    def run(self, rollout: Rollout, draw: PlanDraw, feedback: Feedback) -> SweepResult:
        """Accumulates the gradient of the whole surrogate, summed over the batch.

        Raises:
            FloatingPointError: an adjoint is not finite; names the step.
            ValueError: first-order steps without `feedback.reward_gradient`.
        """
        if self.recompute not in RECOMPUTE_MODES:
            raise ValueError(f"recompute={self.recompute!r}: must be one of {RECOMPUTE_MODES}")
        if draw.first_order.any() and feedback.reward_gradient is None:
            raise ValueError("the plan has first-order steps but feedback.reward_gradient is None")
        result = SweepResult()
        blocks = self._blocks(draw, range(draw.num_steps) if feedback.penalty else draw.active_steps())
        for number, block in enumerate(blocks):
            with self.scope(block, number == len(blocks) - 1):
                self._run_block(block, rollout, draw, feedback, result)
        return result

    def _blocks(self, draw: PlanDraw, steps: Sequence[int]) -> list[list[int]]:
        """Runs of consecutive steps differentiated in one graph, last first: single steps when recursive."""
        blocks: list[list[int]] = []
        for step in reversed(steps):
            linked = bool(blocks) and blocks[-1][0] == step + 1 and bool(draw.pathwise[:, step].any())
            if linked and self.recompute == "graph":
                blocks[-1].insert(0, step)
            else:
                blocks.append([step])
        return blocks

    def _run_block(self, block: list[int], rollout: Rollout, draw: PlanDraw, feedback: Feedback, result: SweepResult) -> None:
        first, last = block[0], block[-1]
        # The adjoint matters to the step before only if that step is pathwise for some row, and not already in this block.
        carries = first > 0 and bool(draw.pathwise[:, first - 1].any())
        adjoint = result.adjoint
        if last == rollout.num_steps - 1:
            adjoint = feedback.reward_gradient
        # before the block's own graph is there: decoder, reward and the network's call for the prediction then have the memory alone
        predictions = {step: self._predict(step, rollout, draw, feedback) for step in block}
        start = rollout.latents[first].detach().requires_grad_(carries)
        x, total = start, torch.zeros((), device=start.device, dtype=start.dtype)
        for step in block:
            mean, std = self.chain.transition(step, x, self.params)
            total = total + self._local_surrogate(step, mean, std, predictions[step], rollout, draw, feedback, result)
            if feedback.penalty is not None:
                with torch.set_grad_enabled(x.requires_grad):  # its parameters are not trained, but its input may carry the adjoint
                    reference = feedback.penalty.reference(step, x)
                penalty = (feedback.penalty.weight * gaussian_divergence(mean, std, *reference)).sum()
                result.divergence = result.divergence - penalty.detach()
                total = total - penalty
            if step == last:
                if draw.pathwise[:, step].any() and adjoint is not None:
                    masked = adjoint * _rows(draw.pathwise[:, step], adjoint)
                    total = total + pathwise(masked, mean, std, rollout.noises[step]).sum()
            else:
                x = torch.where(
                    _rows(draw.pathwise[:, step], x) > 0,
                    next_latent(mean, std, rollout.noises[step]),
                    rollout.latents[step + 1],
                )
        factor = self.backward(total)
        result.adjoint = None
        if carries:
            assert start.grad is not None
            result.adjoint = start.grad / factor
            if factor in (1, -1) and not torch.isfinite(result.adjoint).all():
                raise FloatingPointError(
                    f"step {first}: the adjoint, shape {tuple(result.adjoint.shape)}, has non-finite values; shorten fo_steps "
                    "or ho_length, or use a wider precision"
                )

    def _predict(self, step: int, rollout: Rollout, draw: PlanDraw, feedback: Feedback) -> tuple[Tensor, Tensor] | None:
        """c [N] and g [N, ...] at the output of a step; None if the step does not ask. 0 for samples without a reward."""
        is_controlled = self.control_scale is not None and bool((draw.score[:, step] != 0).any())
        if not is_controlled and not bool((draw.prediction[:, step] != 0).any()):
            return None
        if self.critic is None or feedback.scale is None:
            raise ValueError("the plan asks the one-step prediction: it needs a critic and feedback.scale")
        value, gradient = self.critic(step + 1, rollout.latents[step + 1])
        has_reward = feedback.scale != 0  # without one, the prediction's may be NaN as well, and counts for nothing
        value, gradient = torch.where(has_reward, value, 0.0), torch.where(_rows(has_reward, gradient) > 0, gradient, 0.0)
        finite = torch.isfinite(gradient).flatten(1).all(1)
        if not finite.all():
            raise FloatingPointError(
                f"step {step}: the gradient of the predicted reward is not finite for {int((~finite).sum())} of {len(finite)} samples; look "
                "for sqrt, log or a norm at 0 in the reward, or use a wider precision"
            )
        return value, gradient

    def _local_surrogate(
        self,
        step: int,
        mean: Tensor,
        std: Tensor,
        predicted: tuple[Tensor, Tensor] | None,
        rollout: Rollout,
        draw: PlanDraw,
        feedback: Feedback,
        result: SweepResult,
    ) -> Tensor:
        """Score and prediction terms of one step, summed over the batch."""
        score = draw.score[:, step].to(mean)
        prediction = draw.prediction[:, step].to(mean)
        advantage = feedback.advantage
        is_scored = bool((score != 0).any())
        if is_scored and feedback.penalty is not None:
            advantage = advantage - feedback.penalty.weight * feedback.penalty.to_go[:, step]
        if predicted is not None:
            assert feedback.scale is not None
            value, gradient = predicted
            result.critic_values[step] = value
            if is_scored and self.control_scale is not None:
                # alpha scales c; a sample's centre is the mean of the others' c, so it sees none of its own noise
                alpha = self.control_scale.scale(step)
                advantage = control_variate(
                    advantage, value * feedback.scale, alpha, leave_one_out_mean(value, feedback.blocks) * feedback.scale
                )
                prediction = prediction + alpha * score
            weighted = gradient * _rows(prediction * feedback.scale, gradient)
            total = prediction_pathwise(weighted, mean, std, rollout.noises[step]).sum()
        else:
            total = torch.zeros((), device=mean.device, dtype=mean.dtype)
        if is_scored:
            if not bool((rollout.stds[step] > 0).all()):
                raise PlanError(
                    f"step {step} adds no noise (std = 0), so it has no likelihood ratio; cover it by first order (fo_steps)"
                )
            surrogate, log_ratio = likelihood_ratio(
                advantage,
                rollout.latents[step + 1],
                mean,
                std,
                rollout.means[step],
                rollout.stds[step],
                clip_range=self.clip_range,
                mean_density=self.mean_density,
            )
            result.log_ratios[step] = log_ratio
            result.surrogates[step] = surrogate.detach() / (mean[0].numel() if self.mean_density else 1)
            total = total + (score * surrogate).sum()
        return total


def _rows(per_sample: Tensor, like: Tensor) -> Tensor:
    """[N] or [1] reshaped to broadcast against [N, ...]."""
    return per_sample.to(like).reshape(-1, *[1] * (like.dim() - 1))
