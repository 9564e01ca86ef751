"""What single steps cost, and how noisy their shares of the gradient are: B_h, B_z, V_h and V_z of formula (8), and more."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rlr_trainer.diagnosis.memory import measuring_memory
from rlr_trainer.diagnosis.plans import zeroth_order_options
from rlr_trainer.diagnosis.statistics import RunningVariance
from rlr_trainer.diagnosis.workbench import Batch, Workbench
from rlr_trainer.estimators.first_order import NonDifferentiableRewardError, pathwise, reward_and_gradient
from rlr_trainer.estimators.half_order import likelihood_ratio
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.zeroth_order import Perturbations

TIMED_REPEATS = 3
ZEROTH_BATCHES = 6  # at most so many for the noise of zeroth-order steps
DEAD_BATCHES = 4  # batches without any gradient after which a reward counts as a black box
BLACK_BOX = "the reward has no gradient"
DEAD_GRADIENT = (
    "the reward has a graph, but its gradient is exactly 0 for every picture although the rewards differ (rounding, a threshold or "
    "argmax inside?), so it is treated as a black box"
)


class Deadline:
    """A wall-clock limit of `seconds` from now, with a progress bar on a terminal unless `quiet`."""

    def __init__(self, seconds: float, quiet: bool = True) -> None:
        self.seconds = seconds
        self._start = time.perf_counter()
        shape = "{desc} |{bar}| {n:.0f} of {total:.0f} s"
        self._bar = tqdm(total=seconds, disable=quiet or not sys.stderr.isatty(), bar_format=shape, leave=False)
        self.close = self._bar.close

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self._start)

    def report(self, what: str) -> None:
        """Shows what is being done."""
        self._bar.set_description(f"diagnosing: {what}", refresh=False)
        self._bar.n = self.seconds - max(self.left, 0.0)
        self._bar.refresh()


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of one piece of work on one sampling batch."""

    seconds: float  # median wall time
    held_bytes: int  # between forward and backward pass (0 without one)
    peak_bytes: int  # most that is held at any time, beyond weights and stored latents


Numbers = list[float | None]  # None: not there


@dataclasses.dataclass(frozen=True)
class VarianceProfile:
    """Noise of every step's share of the gradient of the mean reward. Lists of T numbers, steps from the noisy end.

    A variance is the trace of a covariance matrix, per sample (that of one update times the samples in it), in squared reward units per
    unit of weight. None: not measured.

    Attributes:
        num_batches, num_samples: what it was measured on; samples per batch.
        stds: standard deviation of the transition, in latent units.
        fo_variance, lr_variance: of the pathwise and of the likelihood-ratio share.
        zo_variance: one step's zeroth-order share, mean over the steps.
        total_variance, total_variance_error: T + 1 numbers, index K: FO on the last K steps + LR on the others, covariances included.
    """

    num_batches: int
    num_samples: int
    stds: list[float]
    fo_variance: Numbers
    lr_variance: Numbers
    zo_variance: float | None
    total_variance: Numbers
    total_variance_error: Numbers

    @property
    def std_ho(self) -> float | None:
        """V_h: root mean square over the steps of one half-order (h = 1) step's standard deviation, per sample."""
        known = [v for v in self.lr_variance if v is not None]
        return math.sqrt(statistics.fmean(known)) if known else None

    @property
    def std_zo(self) -> float | None:
        """V_z: the same of one zeroth-order step."""
        return None if self.zo_variance is None else math.sqrt(self.zo_variance)


class ProfileBuilder:
    """Takes in batches one by one.

    Attributes:
        reference: the plan that others are compared with: pathwise, or for a black box the likelihood ratio of the steps with noise.
        windows: (n, K) of the plans with a likelihood ratio on the first n steps, which have noise, and first order on the last K.
    """

    def __init__(self, bench: Workbench, differentiable: bool) -> None:
        self.bench, self.differentiable = bench, differentiable
        steps = bench.num_steps
        self.silent = [step for step, std in enumerate(bench.stds) if not std > 0]
        ratio = EstimatorPlan(steps, rest_estimator="lr", silent_estimator="none" if self.silent else None)
        # where no step has noise, nothing has a likelihood ratio
        self.plans = {"fo": EstimatorPlan.from_preset("full_bp", steps)}
        if len(self.silent) < steps:
            self.plans["ho"] = ratio.on_noise(bench.stds)
        self.reference = self.plans["fo" if differentiable else "ho"]
        self.shares = {kind: RunningVariance() for kind in ("fo", "ho", "zo")}  # of single steps
        self.combinations = RunningVariance()  # of FO(K) + LR(rest), for every K
        noisy = self.silent[0] if self.silent else steps
        fo_steps = bench.plan.fo_range[1] if differentiable else 0
        self.windows = [(n, min(fo_steps, steps - n)) for n in range(1, noisy + 1)]
        if fo_steps and noisy:  # and those that first order completes
            self.windows += [(n, steps - n) for n in range(1, noisy + 1) if (n, steps - n) not in self.windows]
        self._of_windows = RunningVariance()
        self.seconds: dict[str, list[float]] = {"sample": [], "fo": [], "ho": []}  # sampling; one step's backward pass

    @property
    def count(self) -> int:
        return self.combinations.count

    def add(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Takes in a batch of the reference plan; returns the pathwise and likelihood-ratio shares, [T, P] each, NaN where there are none."""
        absent = torch.full((self.bench.num_steps, self.bench.reader.size), math.nan)
        ratio = self._measure("ho", batch) if "ho" in self.plans else absent
        first_order = self._measure("fo", batch) if self.differentiable else absent
        steps = len(ratio)
        before, after = _sums(ratio), _sums(first_order.flip(0))  # of the first n steps; of the last K
        self.combinations.add(torch.stack([before[steps - k] + after[k] for k in range(steps + 1)]))
        if self.windows:
            self._of_windows.add(torch.stack([before[n] + after[k] for n, k in self.windows]))
        self.seconds["sample"].append(batch.sample_seconds)
        return first_order, ratio

    def add_zeroth(self, wanted: int, has_time: Callable[[], bool] = lambda: True) -> None:
        """Measures zeroth-order shares on batches with perturbed parameters, until there are `wanted` or the time is up."""
        bench, moments = self.bench, self.shares["zo"]
        options = zeroth_order_options(bench.configured_options, bench.batch_size, bench.options.group_size)
        plan = EstimatorPlan.from_preset("es", bench.num_steps, **options)
        while moments.count < wanted and has_time():
            moments.add(bench.zeroth_order_shares(bench.collect(moments.count, plan)))

    def _measure(self, kind: str, batch: Batch) -> Tensor:
        shares, seconds = self.bench.step_shares(self.plans[kind], batch)
        if kind == "ho":
            shares[self.silent] = math.nan
        self.shares[kind].add(shares)
        self.seconds[kind].append(seconds / (self.bench.num_steps - (len(self.silent) if kind == "ho" else 0)))
        return shares

    def step_variances(self) -> list[float]:
        """Total variance of every step's likelihood-ratio share in one update; NaN for steps without noise. From two batches on."""
        moments = self.shares["ho"]
        return moments.value().tolist() if moments.count else [math.nan] * self.bench.num_steps

    def window_variances(self) -> list[float]:
        """Total variance of one update of every window; from two batches on."""
        return self._of_windows.value().tolist() if self.windows else []

    def build(self) -> VarianceProfile:
        """The profile of what was taken in."""
        samples = self.bench.samples_per_update
        absent = torch.full((self.bench.num_steps,), math.nan)
        fo, lr, zo = (_finite((v.value() if v.count else absent) * samples) for v in self.shares.values())
        total, error = (_finite(values * samples) for values in (self.combinations.value(), self.combinations.error()))
        zo_variance = None if None in zo else statistics.fmean(v for v in zo if v is not None)
        return VarianceProfile(self.count, samples, list(self.bench.stds), fo, lr, zo_variance, total, error)


def _sums(shares: Tensor) -> Tensor:
    """Of the first 0, 1, ..., T rows, [T + 1, P]."""
    return torch.cat([torch.zeros_like(shares[:1]), shares.cumsum(0)])


def _finite(values: Tensor) -> Numbers:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def start_profile(bench: Workbench) -> tuple[ProfileBuilder, Batch, str | None]:
    """An empty profile, a batch for its reference, and why the reward counts as a black box (None: it has a gradient)."""
    first_order = EstimatorPlan.from_preset("full_bp", bench.num_steps)
    try:
        batch = bench.collect(0, first_order)
        # a saturated reward may have no gradient on one batch; one that never has any is another thing
        others = (bench.collect(number, first_order) for number in range(1, DEAD_BATCHES))
        if not (batch.has_dead_gradient and all(other.has_dead_gradient for other in others)):
            return ProfileBuilder(bench, differentiable=True), batch, None
        reason = DEAD_GRADIENT
    except NonDifferentiableRewardError:
        reason = BLACK_BOX
    if not any(bench.stds):
        raise ValueError(f"{reason}, and no step adds noise, so that only zeroth order covers them: set sample_eta above 0")
    builder = ProfileBuilder(bench, differentiable=False)
    return builder, bench.collect(0, builder.reference), reason


def build_profile(bench: Workbench, deadline: Deadline, max_batches: int) -> ProfileBuilder:
    """Measures until the deadline or `max_batches`, one batch at least."""
    builder, batch, _ = start_profile(bench)
    add_batches(builder, batch, deadline, max_batches)
    return builder


def add_batches(builder: ProfileBuilder, first: Batch, deadline: Deadline, most: int, least: int = 1) -> None:
    """Adds a batch and others after it, until the deadline or `most`, but `least` whatever the time."""
    builder.add(first)
    cost, bench = deadline.seconds - deadline.left, builder.bench
    while builder.count < most and (builder.count < least or deadline.left > cost):
        deadline.report("steps")
        started = bench.clock()
        builder.add(bench.collect(builder.count, builder.reference))
        cost = bench.clock() - started


def measure_step_costs(bench: Workbench, batch: Batch, differentiable: bool) -> dict[str, StepCost]:
    """Cost of one step of each kind, on one sampling batch, at the middle of the chain.

    Kinds: "sample", "ho" (likelihood ratio, forward and backward), "fo" (pathwise, backward through weights and input), "zo" (perturb
    the weights and step: no backward), "reward" (decode and score) and "reward_gradient" (and differentiate).
    """
    chain, rollout, reward = bench.first(batch)
    step, params = bench.num_steps // 2, chain.parameters()
    x, noise, std = rollout.latents[step], rollout.noises[step], rollout.stds[step]
    perturbations = Perturbations.assign(len(x), 0, 0.01, 1, False)

    def half_order() -> Tensor:
        """The likelihood ratio of the middle step; a step without noise gets a little, or there would be none."""
        mean, now = chain.transition(step, x, params)
        advantage = torch.ones(len(x), device=x.device)
        surrogate, _ = likelihood_ratio(advantage, rollout.latents[step + 1], mean, now.clamp_min(1e-6), rollout.means[step], std)
        return surrogate.sum()

    def first_order() -> Tensor:
        mean, now = chain.transition(step, x.detach().requires_grad_(True), params)
        return pathwise(noise, mean, now, noise).sum()

    sampling = torch.no_grad()
    work: dict[str, Callable[[], Any]] = {
        "sample": sampling(lambda: chain.transition(step, x, params)),
        "ho": half_order,
        "zo": sampling(lambda: chain.transition(step, x, perturbations.perturb(params, step, 0, 1.0))),
        "reward": sampling(lambda: reward(rollout.sample, False)),
    }
    if differentiable:
        work["fo"] = first_order
        work["reward_gradient"] = lambda: reward_and_gradient(lambda latents: reward(latents, True), rollout.sample)
    return {kind: _cost(bench, run) for kind, run in work.items()}


def _cost(bench: Workbench, work: Callable[[], Any]) -> StepCost:
    """Runs `work`, and the backward pass of the scalar with a graph that it may return."""

    def run() -> int:
        """One repeat; returns the bytes that the graph holds before its backward pass."""
        bench.reader.clear()
        outcome = work()
        if not (isinstance(outcome, Tensor) and outcome.requires_grad):
            return 0
        held = meter.held()
        (outcome * bench.factor).backward()
        return held

    with measuring_memory(bench.device) as meter:
        held = run()
        peak = meter.peak()
    seconds = []
    for _ in range(TIMED_REPEATS):
        started = bench.clock()
        run()
        seconds.append(bench.clock() - started)
    bench.reader.clear()
    return StepCost(statistics.median(seconds), held, peak)
