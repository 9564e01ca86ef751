"""How often an update runs the network and the decoder, and what waits for it, from its plan alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rlr_trainer.estimators.chain import seeded_generator
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import PlanDraw

DRAWS = 32  # over which random choices of a plan are averaged


@dataclasses.dataclass(frozen=True)
class NetworkCalls:
    """Calls per sample and update; with guidance one call has two rows.

    Attributes:
        plain, graph: forward passes without and with a graph.
        backward: backward passes.
        decodings, decoder_backward: forward and backward passes of decoder and reward.
    """

    plain: float
    graph: float
    backward: float
    decodings: float
    decoder_backward: float


def stored_latents(plan: EstimatorPlan) -> int:
    """Latents that wait for the update, per sample: T + 1 of the chain, T noises, T means, dR/dx_0, and the control variate's gradients."""
    if plan.forward is not None:
        return 1  # x_0 alone
    controlled = len(plan.scored_steps()) if plan.uses_control_variate else 0
    return 3 * plan.num_steps + 1 + int(plan.needs_differentiable_reward) + controlled


def network_calls(
    plan: EstimatorPlan, stds: Sequence[float], *, kl_coef: float | None = None, passes: int = 1, keep: bool = False
) -> NetworkCalls:
    """The calls of an update of `plan` on a chain whose T transitions have these standard deviations; means over the plan's random choices.

    Args:
        kl_coef: of the reference policy; None for none, 0 for one that is only logged.
        passes: over each rollout (`num_inner_epochs`), which share its sampling.
        keep: graphs stay from sampling (`recompute="keep"`).
    """
    generator = seeded_generator(0)
    draws = [plan.draw(1, generator, shared=True) for _ in range(DRAWS)]
    found = [_of_draw(plan, draw, stds, kl_coef, passes, keep) for draw in draws]
    columns = zip(*(dataclasses.astuple(calls) for calls in found), strict=True)
    return NetworkCalls(*(sum(column) / DRAWS for column in columns))


def _of_draw(
    plan: EstimatorPlan, draw: PlanDraw, stds: Sequence[float], kl_coef: float | None, passes: int, keep: bool
) -> NetworkCalls:
    steps = plan.num_steps
    rollout = steps * (1 if kl_coef is None else 2)  # the reference is asked about every sampled step
    if plan.forward is not None:
        times = int((draw.forward != 0).sum())
        old = times if plan.forward.averages or passes > 1 else 0  # the old policy's prediction
        return NetworkCalls(rollout / passes + old, times, times, 1 / passes, 0)
    noisy = [step for step in range(steps) if stds[step] > 0]
    penalized = noisy if kl_coef else []
    visited = draw.visited_steps([step in penalized for step in range(steps)])
    carrying = sum(draw.carries(step) for step in penalized)  # there the reference has a graph, too
    asked = (draw.prediction != 0).any(0).nonzero()[:, 0].tolist()
    controlled = draw.scored_steps() if plan.uses_control_variate else []
    # a prediction at the end of the chain is the sample itself
    predicted = sum(step < steps - 1 for step in asked) + sum(step < steps - 1 for step in controlled) / passes
    graph = len(visited) + carrying + predicted
    scored = (1 + len(controlled)) / passes + len(asked)
    differentiated = scored if plan.needs_differentiable_reward else 0
    plain = rollout / passes + len(penalized) - carrying - (len(visited) if keep else 0)
    return NetworkCalls(plain, graph, graph, scored, differentiated)
