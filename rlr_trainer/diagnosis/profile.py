"""What single steps cost, and how noisy their shares of the gradient are: B_h, B_z, V_h and V_z of formula (8), and more."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.diagnosis.candidates import zeroth_order_options
from rlr_trainer.diagnosis.memory import measuring_memory
from rlr_trainer.diagnosis.statistics import RESOLVED, RunningMoments
from rlr_trainer.diagnosis.workbench import Batch, Workbench
from rlr_trainer.estimators.first_order import NonDifferentiableRewardError, pathwise, reward_and_gradient
from rlr_trainer.estimators.half_order import likelihood_ratio
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.prediction import prediction_critic
from rlr_trainer.estimators.zeroth_order import Perturbations

TIMED_REPEATS = 3
ZEROTH_BATCHES = 6
FIRST_BATCH = 0
DEAD_BATCHES = 4  # batches without any gradient after which a reward counts as a black box
BLACK_BOX = "the reward has no gradient"
DEAD_GRADIENT = (
    "the reward has a graph, but its gradient is exactly 0 for every picture although the rewards differ (rounding, a threshold or "
    "argmax inside?), so it is treated as a black box"
)


class Deadline:
    """A wall-clock limit.

    Args:
        seconds: from now.
        on_progress: called with (elapsed seconds, what is being done).
    """

    def __init__(self, seconds: float, on_progress: Callable[[float, str], None] | None = None) -> None:
        self.seconds = seconds
        self._start = time.perf_counter()
        self.on_progress = on_progress

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed

    def report(self, what: str) -> None:
        """Tells the progress bar."""
        if self.on_progress is not None:
            self.on_progress(self.elapsed, what)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of one piece of work on one sampling batch.

    Attributes:
        seconds: median wall time.
        held_bytes: held between forward and backward pass, for the backward pass (0 without one).
        peak_bytes: most that is held at any time, beyond weights and stored latents.
    """

    seconds: float
    held_bytes: int
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class VarianceProfile:
    """Size and noise of every step's share of the gradient. Lists of T numbers (None: not there), steps from the noisy end.

    Gradients are of the mean reward, in reward units per unit of weight. A variance is the trace of a covariance matrix, per
    sample: that of one update times the samples in it. "fo" is the pathwise share of a step, "lr" the likelihood-ratio share.

    Attributes:
        num_batches, num_samples: what it was measured on; samples per batch.
        stds: standard deviation of the transition, in latent units.
        fo_norm, lr_norm: norm of the mean share, noise subtracted (None: not above the noise, or not measured). Both estimate the
            same thing.
        fo_rms, lr_rms: typical norm of the share of one update, noise included.
        fo_variance, lr_variance: per sample.
        zo_variance: one step's zeroth-order share, per sample, mean over the steps; None: not measured.
        total_variance: T + 1 numbers, index K: FO on the last K steps + LR on the others, covariances included, per sample.
        total_variance_error: their standard errors.
    """

    num_batches: int
    num_samples: int
    stds: list[float]
    fo_norm: list[float | None]
    lr_norm: list[float | None]
    fo_rms: list[float | None]
    lr_rms: list[float | None]
    fo_variance: list[float | None]
    lr_variance: list[float | None]
    zo_variance: float | None
    total_variance: list[float | None]
    total_variance_error: list[float | None]

    @property
    def std_ho(self) -> float | None:
        """V_h: root mean square over the steps of one half-order (h = 1) step's standard deviation, per sample."""
        known = [v for v in self.lr_variance if v is not None]
        return math.sqrt(sum(known) / len(known)) if known else None

    @property
    def std_zo(self) -> float | None:
        """V_z: the same of one zeroth-order step."""
        return None if self.zo_variance is None else math.sqrt(self.zo_variance)

    def choices(self) -> list[float]:
        """`total_variance` for `choose_fo_steps`: infinite for a K that cannot be."""
        return [math.inf if v is None else v for v in self.total_variance]


class ProfileBuilder:
    """Takes in batches one by one.

    Args:
        bench: where updates are computed.
        differentiable: whether the reward has a gradient.
    """

    def __init__(self, bench: Workbench, differentiable: bool) -> None:
        self.bench, self.differentiable = bench, differentiable
        steps = bench.num_steps
        # K below this would leave a step without noise to the likelihood ratio
        self.fewest_fo = max((steps - step for step, std in enumerate(bench.stds) if not std > 0), default=0)
        self.full = EstimatorPlan.from_preset("full_bp", steps)
        self.ratio = EstimatorPlan(steps, fo_steps=self.fewest_fo, rest_estimator="lr")
        self.plan = self.full if differentiable else self.ratio  # the reference
        self.moments = {name: RunningMoments() for name in ("fo", "lr", "total", "reference", "zo")}
        self.seconds: dict[str, list[float]] = {"sample": [], "fo": [], "lr": []}  # of sampling, and of one step's backward pass

    @property
    def count(self) -> int:
        return self.moments["total"].count

    def add(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """Takes in a batch that was sampled for the reference plan.

        Returns:
            Pathwise (None for a black box) and likelihood-ratio share of every step, [T, P] each.
        """
        first_order = self._shares_of("fo", self.full, batch) if self.differentiable else None
        ratio = self._shares_of("lr", self.ratio, batch)
        self.moments["total"].add(_combinations(first_order, ratio))
        self.moments["reference"].add((ratio if first_order is None else first_order).sum(0, keepdim=True))
        self.seconds["sample"].append(batch.sample_seconds)
        return first_order, ratio

    def add_reference(self, batch: Batch) -> Tensor:
        """Takes in the reference alone; returns its update [P]."""
        kind, plan = ("fo", self.full) if self.differentiable else ("lr", self.ratio)
        update = self._shares_of(kind, plan, batch).sum(0)
        self.moments["reference"].add(update[None])
        self.seconds["sample"].append(batch.sample_seconds)
        return update

    def _shares_of(self, kind: str, plan: EstimatorPlan, batch: Batch) -> Tensor:
        shares, seconds = self.bench.update(plan, batch, per_step=True)
        self.moments[kind].add(shares)
        self.seconds[kind].append(seconds / self.bench.num_steps)
        return shares

    @property
    def reference_relative_error(self) -> float:
        """Standard error of |reference gradient|^2 over its value; infinite while it is not above 0 or not known."""
        moments = self.moments["reference"]
        square, error = float(moments.mean_squares()), float(moments.mean_square_errors())
        return error / square if square > 0 and math.isfinite(error) else math.inf

    def add_zeroth(self, number: int) -> None:
        """Samples a batch with perturbed parameters and takes in the share of every step."""
        config, steps = self.bench.config, self.bench.num_steps
        options = zeroth_order_options(config, config.sample_batch_size)
        plan = EstimatorPlan.from_preset("es", steps, **options)
        batch = self.bench.collect(number, plan)
        shares = [self.bench.reader.flatten(self.bench.zeroth_order_term(batch, step=step)) for step in range(steps)]
        self.moments["zo"].add(torch.stack(shares))

    def build(self) -> VarianceProfile:
        """The profile of what was taken in."""
        samples, zeroth = self.bench.samples_per_update, self.moments["zo"]
        total = self.moments["total"]
        missing: list[float | None] = [None] * (self.bench.num_steps + 1 - len(total.variances()))
        impossible: list[float | None] = [None] * self.fewest_fo
        fo, lr = self._shares("fo", self.bench.num_steps), self._shares("lr", self.bench.num_steps - self.fewest_fo)
        return VarianceProfile(
            num_batches=self.count,
            num_samples=samples,
            stds=list(self.bench.stds),
            fo_norm=fo["norm"],
            lr_norm=lr["norm"],
            fo_rms=fo["rms"],
            lr_rms=lr["rms"],
            fo_variance=fo["variance"],
            lr_variance=lr["variance"],
            zo_variance=float(zeroth.variances().mean()) * samples if zeroth.count > 1 else None,
            total_variance=impossible + _finite(total.variances() * samples)[self.fewest_fo :] + missing,
            total_variance_error=impossible + _finite(total.variance_errors() * samples)[self.fewest_fo :] + missing,
        )

    def _shares(self, name: str, known: int) -> dict[str, list[float | None]]:
        """Norm, typical norm and variance of every step's share; None after the first `known` steps."""
        steps, moments = self.bench.num_steps, self.moments[name]
        if not moments.count:
            return {what: [None] * steps for what in ("norm", "rms", "variance")}
        squares, errors = moments.mean_squares(), moments.mean_square_errors()
        norms = torch.where(squares > RESOLVED * errors, squares.clamp_min(0).sqrt(), math.nan)
        values = {
            "norm": norms,
            "rms": moments.root_mean_squares(),
            "variance": moments.variances() * self.bench.samples_per_update,
        }
        return {what: _finite(numbers)[:known] + [None] * (steps - known) for what, numbers in values.items()}


def _combinations(first_order: Tensor | None, ratio: Tensor) -> Tensor:
    """FO on the last K steps + LR on the others, for K = 0..T, from per-step shares [T, P]: [T + 1, P] (only K = 0 without FO)."""
    if first_order is None:
        return ratio.sum(0, keepdim=True)
    steps = len(ratio)
    return torch.stack([ratio[: steps - k].sum(0) + first_order[steps - k :].sum(0) for k in range(steps + 1)])


def _finite(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def reference_batch(bench: Workbench, number: int) -> tuple[Batch, bool, str | None]:
    """A batch sampled for the pathwise reference, or for the likelihood ratio if the reward is a black box.

    Returns:
        The batch, whether the reward is differentiable, and why not.
    """
    black_box, pathwise_plan = (EstimatorPlan.from_preset(name, bench.num_steps) for name in ("ddpo", "full_bp"))
    try:
        batch = bench.collect(number, pathwise_plan)
    except NonDifferentiableRewardError:
        return bench.collect(number, black_box), False, BLACK_BOX
    # a saturated reward may have no gradient on one batch; one that never has any is another thing
    others = (bench.collect(number + more, pathwise_plan) for more in range(1, DEAD_BATCHES))
    if _is_dead(batch) and all(_is_dead(other) for other in others):
        return bench.collect(number, black_box), False, DEAD_GRADIENT
    return batch, True, None


def _is_dead(batch: Batch) -> bool:
    """Whether the rewards differ although the reward's gradient is exactly 0 for every picture."""
    gradients = [e.reward_gradient for e in batch.experiences]
    rewards = torch.cat([e.rewards for e in batch.experiences])
    return all(g is not None and not g.any() for g in gradients) and len(rewards[~torch.isnan(rewards)].unique()) > 1


def start_profile(bench: Workbench) -> tuple[ProfileBuilder, Batch, str | None]:
    """An empty profile, its first batch, and why the reward counts as a black box (None: it has a gradient).

    Raises:
        ValueError: a black-box reward on a chain with a step without noise.
    """
    batch, differentiable, reason = reference_batch(bench, FIRST_BATCH)
    builder = ProfileBuilder(bench, differentiable)
    if not differentiable and builder.fewest_fo:
        raise ValueError(
            f"{reason}, and step {bench.num_steps - builder.fewest_fo} adds no noise, so that no estimator but zeroth order covers it: set "
            "sample_eta above 0"
        )
    return builder, batch, reason


def build_profile(bench: Workbench, deadline: Deadline, max_batches: int, *, zeroth: bool = True) -> ProfileBuilder:
    """Measures until the deadline or `max_batches`, one batch at least."""
    started = bench.clock()
    builder, batch, _ = start_profile(bench)
    builder.add(batch)
    cost = bench.clock() - started
    while zeroth and builder.moments["zo"].count < min(ZEROTH_BATCHES, max_batches) and deadline.left > 3 * cost:
        builder.add_zeroth(FIRST_BATCH + builder.moments["zo"].count)
    while builder.count < max_batches and deadline.left > cost:
        deadline.report("steps")
        started = bench.clock()
        builder.add(bench.collect(FIRST_BATCH + builder.count, builder.plan))
        cost = bench.clock() - started
    return builder


def measure_step_costs(bench: Workbench, batch: Batch, differentiable: bool) -> dict[str, StepCost]:
    """Cost of one step of each kind, on one sampling batch, at the middle of the chain.

    Kinds: "sample" (a step of sampling), "ho" (likelihood ratio, forward and backward), "fo" (pathwise, backward through weights and
    input), "zo" (perturb the weights and step: no backward), "prediction" (reward of the one-step prediction and its gradient),
    "reward" (decode and score) and "reward_gradient" (and differentiate).
    """
    experience = batch.experiences[0]
    chain, step = bench.chain(experience), bench.num_steps // 2
    params, rollout = chain.parameters(), experience.rollout
    x, noise, std = rollout.latents[step], rollout.noises[step], rollout.stds[step]
    perturbations = Perturbations.assign(len(experience), 0, 0.01, 1, False)

    def half_order() -> Tensor:
        mean, now = chain.transition(step, x, params)
        advantage = torch.ones(len(x), device=x.device)
        surrogate, _ = likelihood_ratio(advantage, rollout.latents[step + 1], mean, now.clamp_min(1e-6), rollout.means[step], std)
        return surrogate.sum()

    def first_order() -> Tensor:
        mean, now = chain.transition(step, x.detach().requires_grad_(True), params)
        return pathwise(noise, mean, now, noise).sum()

    @torch.no_grad()
    def zeroth() -> None:
        chain.transition(step, x, perturbations.perturb(params, step, 0, 1.0))

    @torch.no_grad()
    def sample() -> None:
        chain.transition(step, x, params)

    @torch.no_grad()
    def reward() -> None:
        bench.reward(rollout.sample, experience, differentiable=False)

    def reward_gradient() -> None:
        reward_and_gradient(lambda latents: bench.reward(latents, experience, differentiable=True), rollout.sample)

    def prediction() -> None:
        prediction_critic(chain, params, lambda latents: bench.reward(latents, experience, differentiable=True))(step, x)

    work: dict[str, Callable[[], Any]] = {"sample": sample, "ho": half_order, "zo": zeroth, "reward": reward}
    if differentiable:
        work |= {"fo": first_order, "prediction": prediction, "reward_gradient": reward_gradient}
    return {kind: _cost(bench, run) for kind, run in work.items()}


def _cost(bench: Workbench, work: Callable[[], Any]) -> StepCost:
    """Runs `work`, and the backward pass of the scalar that it may return."""

    def run() -> int:
        bench.reader.clear()
        scalar = work()
        held = meter.held()
        if isinstance(scalar, Tensor):
            (scalar * bench.factor).backward()
            return held
        return 0

    with measuring_memory(bench.device) as meter:
        held = run()
        peak = meter.peak()
        bench.reader.clear()
    seconds = []
    for _ in range(TIMED_REPEATS):
        started = bench.clock()
        run()
        seconds.append(bench.clock() - started)
    bench.reader.clear()
    return StepCost(statistics.median(seconds), held, peak)
