"""Measures candidate plans against each other on the same rollouts, within a time limit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from rlr_trainer.diagnosis.memory import measuring_memory
from rlr_trainer.diagnosis.plans import Candidate
from rlr_trainer.diagnosis.statistics import MINIMUM_BATCHES, Products
from rlr_trainer.diagnosis.step_profile import ZEROTH_BATCHES, Deadline, ProfileBuilder, StepCost
from rlr_trainer.diagnosis.workbench import Batch
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.prediction import ControlVariateScale

FITTED = 2  # batches after which the control variate's scale is fitted rather than 1


@dataclasses.dataclass
class Measured:
    """What the updates of one candidate left behind."""

    candidate: Candidate
    is_composed: bool  # put together from the per-step shares that all such plans have in common
    control_scale: ControlVariateScale | None
    gradients: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # batch number -> update [P]
    own_reference: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # of a sampler of its own; empty for the run's
    sweep_seconds: list[float] = dataclasses.field(default_factory=list)  # without sampling and reward
    sample_seconds: list[float] = dataclasses.field(default_factory=list)
    sweep_bytes: int = 0  # most memory of an update beyond weights and rollouts; 0: not measured
    cost: float = math.inf  # seconds of its last round


def is_composable(plan: EstimatorPlan) -> bool:
    """Whether an update is a sum of pathwise shares of the last K steps and (or not) the likelihood-ratio shares of all others."""
    low, high = plan.fo_range
    rest_lr = plan.rest_estimator == "lr" and plan.rest_num_steps is None and plan.ho_length <= 1 and not plan.control_variate
    rest_none = plan.rest_estimator == "none" and plan.ho_length == 0
    segments = plan.silent_estimator == "ho" and bool(plan.silent_steps)
    return low == high and (rest_lr or rest_none) and not segments and plan.fo_weight == plan.ho_weight == plan.rest_weight == 1


def compose(plan: EstimatorPlan, first_order: Tensor, ratio: Tensor) -> Tensor:
    """The update [P] of a composable plan, from the shares of every step, [T, P]. Steps without noise have no likelihood-ratio share."""
    before = plan.num_steps - plan.fo_range[0]
    update = first_order[before:].sum(0)
    return update + ratio[:before].nansum(0) if plan.rest_estimator == "lr" else update


class Comparison:
    """Rounds of one update per candidate; in a round all see the same prompts and the same noise.

    Plans of first-order and single likelihood-ratio steps are sums of the same per-step shares: two sweeps give them all. The first
    round warms up and measures memory (which slows it on the CPU); its gradients count, its times do not.
    """

    def __init__(self, builder: ProfileBuilder, candidates: list[Candidate]) -> None:
        self.builder, self.bench = builder, builder.bench
        composes = self.bench.recompute == "recursive"  # otherwise time and memory would not be those of the plan
        self.measured = [
            Measured(c, composes and c.schedule is None and is_composable(c.plan), self.bench.control_scale(c.plan))
            for c in candidates
        ]
        self.reference: dict[int, Tensor] = {}  # batch number -> update [P]
        self.rollout_bytes = 0

    def run(self, first_batch: Batch, deadline: Deadline, max_rounds: int) -> list[str]:
        """Measures until the deadline or `max_rounds`; returns notes on what the time did not allow."""
        self.rollout_bytes = first_batch.num_bytes
        shared_cost = self._shared(first_batch)
        notes = self._warm_up(first_batch, deadline, shared_cost)
        self.builder.add_zeroth(ZEROTH_BATCHES, lambda: deadline.left > MINIMUM_BATCHES * shared_cost)
        for number in range(first_batch.number + 1, first_batch.number + max_rounds):
            if deadline.left < shared_cost:
                break
            deadline.report(f"batch {number + 1}, shares of the steps")
            batch = self.bench.collect(number, self.builder.reference)
            shared_cost = self._shared(batch) + batch.sample_seconds + batch.reward_seconds
            for entry in self.measured:
                if not entry.is_composed and entry.cost < deadline.left:
                    self._measure(entry, batch, deadline)
        return notes

    def _warm_up(self, batch: Batch, deadline: Deadline, spent: float) -> list[str]:
        """Keeps the most important candidates for which the time allows `MINIMUM_BATCHES` rounds beside the shared seconds `spent`."""
        allowed, dropped = deadline.left / MINIMUM_BATCHES, []
        reserved = deadline.left - allowed
        for entry in [e for e in self.measured if not e.is_composed]:
            if deadline.left > reserved:
                self._measure(entry, batch, deadline, warm_up=True)
            if spent + entry.cost > allowed:
                self.measured.remove(entry)
                dropped.append(entry.candidate.name)
            else:
                spent += entry.cost
        note = f"not measured, because time_limit={deadline.seconds:g} s does not allow it: {', '.join(dropped)}"
        return [note] if dropped else []

    def _shared(self, batch: Batch) -> float:
        """Updates of the reference and of all composed plans on a batch; returns the seconds."""
        started = self.bench.clock()
        first_order, ratio = self.builder.add(batch)
        self.reference[batch.number] = compose(self.builder.reference, first_order, ratio)
        for entry in self.measured:
            if entry.is_composed:
                entry.gradients[batch.number] = compose(entry.candidate.plan, first_order, ratio)
        return self.bench.clock() - started

    def _measure(self, entry: Measured, batch: Batch, deadline: Deadline, warm_up: bool = False) -> None:
        plan, scale, started = entry.candidate.plan, entry.control_scale, self.bench.clock()
        deadline.report(f"batch {batch.number + 1}, {entry.candidate.name}")
        fitted = scale is None or int(scale.counts.max()) >= FITTED
        with measuring_memory(self.bench.device) if warm_up else contextlib.nullcontext() as meter:
            own = self._batch_of(entry, batch)
            gradient, seconds = self.bench.update(plan, own, scale)
            if meter is not None:
                entry.sweep_bytes = meter.peak()
        if entry.candidate.schedule is not None and self.builder.differentiable:
            entry.own_reference[batch.number] = self.bench.update(self.builder.reference, own)[0]
        if not warm_up:
            entry.sweep_seconds.append(seconds)
            entry.sample_seconds.append(own.sample_seconds)
        if fitted:
            entry.gradients[batch.number] = gradient
        entry.cost = self.bench.clock() - started

    def _batch_of(self, entry: Measured, batch: Batch) -> Batch:
        """The shared batch, or for a plan that perturbs parameters or is sampled otherwise one of its own, from the same noise."""
        plan, schedule = entry.candidate.plan, entry.candidate.schedule
        if schedule is None:
            return self.bench.collect(batch.number, plan) if plan.uses_zeroth_order else batch
        return self.bench.collect(batch.number, self.builder.reference if self.builder.differentiable else plan, schedule)

    def seconds(self, entry: Measured, costs: Mapping[str, StepCost]) -> float | None:
        """Wall time of one update: sampling, reward and backward sweep; medians. Of composed plans the sum of their steps' times."""
        plan, spent = entry.candidate.plan, self.builder.seconds
        other = costs[_reward_kind(plan)].seconds * self.bench.num_batches
        other += statistics.median(entry.sample_seconds or spent["sample"])
        if entry.is_composed:
            return other + sum(n * statistics.median(spent[kind]) for kind, n in _steps_by_kind(plan).items() if n)
        return other + statistics.median(entry.sweep_seconds) if entry.sweep_seconds else None

    def peak_bytes(self, entry: Measured, costs: Mapping[str, StepCost]) -> int | None:
        """Most memory of one update beyond the weights: rollouts, and the largest of what is done with them."""
        plan, sweep = entry.candidate.plan, entry.sweep_bytes
        if entry.is_composed:
            sweep = max(costs[kind].peak_bytes for kind, n in _steps_by_kind(plan).items() if n)
        if not sweep:
            return None
        return self.rollout_bytes + max(sweep, costs["sample"].peak_bytes, costs[_reward_kind(plan)].peak_bytes)

    def products(self, entry: Measured) -> Products:
        """Of the updates of a candidate and of the reference on the same batches."""
        updates = self.reference if self.is_reference(entry) else entry.gradients
        reference = entry.own_reference or self.reference
        if not updates:
            return Products.of(*torch.zeros(2, 0, self.bench.reader.size))
        return Products.of(torch.stack(list(updates.values())), torch.stack([reference[number] for number in updates]))

    def is_reference(self, entry: Measured) -> bool:
        """Whether it is what the others are compared with."""
        return entry.candidate.plan == self.builder.reference and entry.candidate.schedule is None

    def has_reference(self, entry: Measured) -> bool:
        """Whether its share of a gradient can be told: not for a sampler of its own with a black-box reward."""
        return entry.candidate.schedule is None or self.builder.differentiable


def _steps_by_kind(plan: EstimatorPlan) -> dict[str, int]:
    """First-order and likelihood-ratio steps of a composable plan."""
    first = plan.fo_range[0]
    return {"fo": first, "ho": len(plan.scored_steps())}


def _reward_kind(plan: EstimatorPlan) -> str:
    return "reward_gradient" if plan.needs_differentiable_reward else "reward"
