"""Which estimator covers which step of the chain: eq. 5 and 6 of arXiv:2502.00639 as a validated object.

A plan splits the T steps of a chain into three disjoint parts: the last `fo_steps` (K) are first-order, a sub-chain of
`ho_length` (h) steps starting at a random step is half-order, and `rest_estimator` covers what remains. `EstimatorPlan.draw`
makes the random choices of one batch and returns them as plain masks and weights, which is all that the estimators see.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.forward_process import ForwardProcess
from rlr_trainer.estimators.plan_draw import PlanDraw, inverse_inclusion_weights, with_segments
from rlr_trainer.estimators.presets import PRESETS

REST_ESTIMATORS = {"lr": "likelihood ratio", "zo": "zeroth order", "prediction": "one-step prediction", "none": "no estimate"}
NAMED_STARTS = ("uniform", "grad_norm")


class PlanError(ValueError):
    """A plan that cannot be: the message names the option, its value, the rule and the way out."""


@dataclasses.dataclass(frozen=True)
class EstimatorPlan:
    """An assignment of estimators to the steps of a chain.

    Attributes:
        num_steps: T, at least 1.
        fo_steps: K, first-order steps at the end of the chain; 0 for none, or `(low, high)` to draw K uniformly once per
            trajectory (AlignProp, arXiv:2310.03739).
        ho_length: h, length of the half-order sub-chain; 0 for none.
        ho_start: where the sub-chain starts: "uniform", "grad_norm" (softmax of running gradient norms, section 3.2 of the
            paper), or `(first, last)` for uniform on a range of step numbers.
        ho_start_weights: T - K - h + 1 non-negative weights that replace `ho_start`: each start is drawn in proportion to its own.
        rest_estimator: "lr" (likelihood ratio of single steps), "zo" (zeroth order, as in the paper), "prediction" (pathwise
            through the one-step prediction, slightly biased) or "none" (biased).
        rest_num_steps: number of remaining steps that "lr" or "prediction" visits, drawn without replacement and each weighted by
            1 / its inclusion probability; None visits all.
        rest_step_weights: T positive weights; inclusion probabilities are proportional to them (at most 1). None is uniform.
        control_variate: subtract the reward of the one-step prediction from the reward in every likelihood-ratio term and add its
            mean back pathwise; unbiased, needs a differentiable reward.
        fo_weight, ho_weight, rest_weight: factors on the parts. The sum is the gradient only when all are 1.
        zo_scale: s, standard deviation of the parameter perturbations.
        zo_num_perturbations: distinct perturbations per batch; each is shared by an equal share of the samples.
        zo_antithetic: use every perturbation with both signs.
        silent_estimator: of likelihood-ratio terms on steps without noise: None refuses them, "none" leaves their share out (biased), "ho"
            covers them by half-order segments: pathwise back from the next step with noise, or from the first-order tail (unbiased).
        silent_steps: the steps without noise, which `on_noise` fills in.
        forward: a loss on the forward process in place of all of these, which then keep their defaults; None for none.
    """

    num_steps: int
    fo_steps: int | tuple[int, int] = 0
    ho_length: int = 0
    ho_start: str | tuple[int, int] = "uniform"
    ho_start_weights: tuple[float, ...] | None = None
    rest_estimator: str = "none"
    rest_num_steps: int | None = None
    rest_step_weights: tuple[float, ...] | None = None
    control_variate: bool = False
    fo_weight: float = 1.0
    ho_weight: float = 1.0
    rest_weight: float = 1.0
    zo_scale: float = 0.01
    zo_num_perturbations: int = 4
    zo_antithetic: bool = True
    silent_estimator: str | None = None
    silent_steps: tuple[int, ...] = ()
    forward: ForwardProcess | None = None

    def __post_init__(self) -> None:
        for name in ("fo_steps", "ho_start", "ho_start_weights", "rest_step_weights"):
            value = getattr(self, name)
            if isinstance(value, list | Tensor):
                object.__setattr__(self, name, tuple(value.tolist() if isinstance(value, Tensor) else value))
        for name, holds, rule in _rules(self):
            if not holds:
                raise PlanError(f"{name}={getattr(self, name)!r}: {rule}")

    @classmethod
    def from_preset(cls, name: str, num_steps: int, **options: Any) -> EstimatorPlan:
        """A named plan (`PRESETS`); every option given (not None) replaces the preset's.

        Raises:
            PlanError: unknown preset or option, or a value outside the chain.
        """
        if name not in PRESETS:
            raise PlanError(f"estimator={name!r}: unknown; choose one of {', '.join(PRESETS)}")
        unknown = sorted(set(options) - set(PLAN_OPTIONS))
        if unknown:
            raise PlanError(f"unknown plan option {', '.join(unknown)}; the options are {', '.join(sorted(PLAN_OPTIONS))}")
        given = {key: value for key, value in options.items() if value is not None}
        chosen = PRESETS[name].plan(num_steps)
        if "forward" in chosen:
            return cls(num_steps, forward=_with_options(name, chosen["forward"], given))
        for option in FORWARD_OPTIONS & given.keys():
            raise PlanError(
                f"{option}={given[option]!r}: is of losses on the forward process, which estimator={name!r} has not; leave it unset, or choose "
                "estimator='awm' or 'nft'"
            )
        chosen = chosen | given
        if "ho_length" not in given:
            # A preset must fit any chain and any K: its sub-chain shrinks; only an explicit h that is too long is an error.
            left = num_steps - cls(num_steps, chosen.get("fo_steps", 0)).fo_range[1]
            chosen["ho_length"] = min(chosen.get("ho_length", 0), left)
        plan = cls(num_steps=num_steps, **chosen)
        if plan.fo_range[1] == 0 and not plan.ho_length and plan.rest_estimator == "none":
            raise PlanError(f"estimator={name!r} with these options estimates no step: set fo_steps, ho_length or rest_estimator")
        return plan

    @property
    def fo_range(self) -> tuple[int, int]:
        """Smallest and largest K."""
        return self.fo_steps if isinstance(self.fo_steps, tuple) else (self.fo_steps, self.fo_steps)

    @property
    def num_starts(self) -> int:
        """Number of admissible starts of the sub-chain; 0 without one."""
        return self.num_steps - self.fo_range[1] - self.ho_length + 1 if self.ho_length else 0

    @property
    def num_rest_steps(self) -> int:
        """Number of steps outside first order (at its smallest K) and the sub-chain."""
        return self.num_steps - self.fo_range[0] - self.ho_length

    @property
    def needs_differentiable_reward(self) -> bool:
        return self.fo_range[1] > 0 or self.rest_estimator == "prediction" or self.uses_control_variate

    @property
    def uses_prediction(self) -> bool:
        """Whether the reward is also asked about one-step predictions."""
        return self.rest_estimator == "prediction" or self.uses_control_variate

    @property
    def uses_control_variate(self) -> bool:
        return self.control_variate and bool(self.scored_steps())

    @property
    def uses_zeroth_order(self) -> bool:
        return self.rest_estimator == "zo" and self.num_rest_steps > 0

    def scored_steps(self) -> list[int]:
        """Steps that may get a likelihood-ratio term, and so need a standard deviation above 0; not those known to have none."""
        starts = [start for start, probability in enumerate(self.start_probabilities()) if probability > 0]
        scored = {start + self.ho_length - 1 for start in starts}
        if self.rest_estimator == "lr":
            inside = range(starts[-1], starts[0] + self.ho_length) if starts else ()  # every sub-chain: never of the rest
            inside = () if scored & set(self.silent_steps) else inside  # but where it ends in silence its other steps are
            scored |= {step for step in range(self.num_steps - self.fo_range[0]) if step not in inside}
        return sorted(scored - set(self.silent_steps))

    def on_noise(self, stds: Sequence[float]) -> EstimatorPlan:
        """The plan on a chain whose T transitions have these `stds`, in latent units.

        Raises:
            PlanError: it would divide by one that is 0; names the step and the way out.
        """
        silent = tuple(step for step in range(self.num_steps) if stds[step] == 0) if self.silent_estimator else ()
        plan = dataclasses.replace(self, silent_steps=silent)
        if self.silent_estimator == "ho" and self.fo_range[0] == 0 and self.num_steps - 1 in silent:
            raise PlanError(
                f"silent_estimator='ho': the last step, {self.num_steps - 1}, adds no noise, so no likelihood ratio after it covers it. Set "
                "fo_steps to 1 or more, choose a sampler or noise_steps with noise there, or silent_estimator='none'"
            )
        scored = plan.scored_steps()
        for step in scored:
            if not stds[step] > 0:
                raise PlanError(
                    f"step {step} of {self.num_steps} adds no noise (std = {stds[step]}), so it has no likelihood ratio. Set sample_eta "
                    f"above 0 if it is 0, cover the step by first order (fo_steps >= {self.num_steps - step}) or by half-order segments "
                    "(silent_estimator='ho'), or leave its share out (silent_estimator='none')"
                )
        estimates_other = self.fo_range[1] or self.uses_zeroth_order or self.rest_estimator == "prediction"
        if self.scored_steps() and not scored and not estimates_other:
            raise PlanError("no step of the chain adds noise, so the plan estimates none of them; set sample_eta above 0")
        return plan

    def __str__(self) -> str:
        """In words, for reports and logs."""
        if self.forward is not None:
            return str(self.forward)
        low, high = self.fo_range
        parts = []
        if high:
            parts.append(f"first order on the last {low if low == high else f'{low} to {high}'} of {self.num_steps} steps")
        if self.ho_length:
            start = self.ho_start if self.ho_start_weights is None else f"by weights {self.ho_start_weights}"
            parts.append(f"half-order sub-chains of {self.ho_length} (start: {start})")
        if self.num_rest_steps:
            perturbed = f" ({self.zo_num_perturbations} perturbations of {self.zo_scale:g})" if self.uses_zeroth_order else ""
            count = "" if self.rest_num_steps is None else f"{self.rest_num_steps} of "
            parts.append(f"{REST_ESTIMATORS[self.rest_estimator]}{perturbed} on {count}the rest")
        if self.uses_control_variate:
            parts.append("with a control variate")
        if self._left_out:
            done = "left out" if self.silent_estimator == "none" else "covered by half-order segments"
            parts.append(f"steps {_listed(self._left_out)} without noise {done}")
        return ", ".join(parts)

    def biases(self) -> list[str]:
        """Why the expected estimate differs from the gradient of the reward; empty for an unbiased plan."""
        if self.forward is not None:
            return [
                f"estimator={self.forward.loss!r} matches samples by their reward on the forward process, which is no gradient of it"
            ]
        rest = self.rest_estimator if self.num_rest_steps else None
        reasons = {
            "none": f"rest_estimator='none' leaves {self.num_rest_steps} of {self.num_steps} steps without an estimate",
            "prediction": "the one-step prediction stands in for the sample on the remaining steps",
            "zo": f"zeroth order differentiates the objective smoothed by zo_scale={self.zo_scale:g}",
        }
        found = [reason for name, reason in reasons.items() if name == rest]
        used = {"fo_weight": self.fo_range[1], "ho_weight": self.ho_length, "rest_weight": rest not in (None, "none")}
        if self.silent_estimator == "none" and self._left_out:
            found.append(f"silent_estimator='none' leaves the share of steps {_listed(self._left_out)}, which add no noise, out")
        return found + [f"{name}={getattr(self, name):g} is not 1" for name in used if used[name] and getattr(self, name) != 1]

    @property
    def _left_out(self) -> list[int]:
        """Steps that get no likelihood-ratio term, because they add no noise."""
        every = dataclasses.replace(self, silent_steps=()).scored_steps()
        return [step for step in every if step in self.silent_steps]

    def start_probabilities(self) -> list[float]:
        """Probability of every admissible start, before "grad_norm" has seen any norm (then uniform). Length `num_starts`."""
        if self.ho_start_weights is not None:
            return [weight / sum(self.ho_start_weights) for weight in self.ho_start_weights]
        first, last = (0, self.num_starts - 1) if isinstance(self.ho_start, str) else self.ho_start
        return [1 / (last - first + 1) if first <= start <= last else 0.0 for start in range(self.num_starts)]

    def draw(
        self,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        shared: bool = False,
        start_probabilities: Sequence[float] | None = None,
    ) -> PlanDraw:
        """Makes the random choices: K, the start of the sub-chain and the subset of the remaining steps.

        Args:
            num_samples: N.
            generator: source of the choices (a CPU generator).
            shared: one draw for the whole batch, so that every network call of a step has the full batch.
            start_probabilities: replaces `start_probabilities()`; "grad_norm" passes its own.

        Returns:
            One row per sample, or a single row when `shared`.
        """
        rows = 1 if shared else num_samples
        steps = torch.arange(self.num_steps)
        low, high = self.fo_range
        fo_steps = torch.randint(low, high + 1, (rows, 1), generator=generator)
        first_order = steps >= self.num_steps - fo_steps
        start = torch.full((rows, 1), -1)
        if self.ho_length:
            probabilities = torch.tensor(start_probabilities or self.start_probabilities(), dtype=torch.float64)
            start = torch.multinomial(probabilities, rows, replacement=True, generator=generator)[:, None]
        end = start + self.ho_length - 1
        sub_chain = (steps >= start) & (steps <= end) & (start >= 0)
        is_silent = torch.isin(steps, torch.tensor(self.silent_steps, dtype=torch.long))
        sub_chain &= ~is_silent[end.clamp_min(0)]  # nothing can be scored at its end: its steps are of the rest
        rest = ~first_order & ~sub_chain
        zeros = torch.zeros(rows, self.num_steps)
        score = torch.where(sub_chain & (steps == end), self.ho_weight, zeros)
        prediction = zeros
        if self.rest_estimator in ("lr", "prediction"):
            weights = self.rest_weight * inverse_inclusion_weights(
                rest & ~is_silent if self.rest_estimator == "lr" else rest, self.rest_num_steps, self.rest_step_weights, generator
            )
            if self.rest_estimator == "lr":
                score = score + weights
            else:
                prediction = weights
        pathwise = first_order | (sub_chain & (steps < end) & (self.ho_weight != 0))
        if self.silent_estimator == "ho":
            pathwise = with_segments(pathwise, score, self.silent_steps)
        return PlanDraw(
            pathwise=pathwise,
            score=score,
            prediction=prediction,
            zeroth=rest if self.rest_estimator == "zo" else torch.zeros_like(rest),
            forward=zeros if self.forward is None else self._forward_weights(steps.expand(rows, -1), generator),
            first_order=first_order,
            start=start[:, 0],
        )

    def _forward_weights(self, steps: Tensor, generator: torch.Generator | None) -> Tensor:
        """The mean over a random subset of noise levels: 1 / their number at each, 0 elsewhere. [R, T]."""
        assert self.forward is not None
        first, end = self.forward.steps
        eligible = (steps >= first) & (steps < end)
        return inverse_inclusion_weights(eligible, self.forward.times, None, generator) / (end - first)


# Options of a loss on the forward process -> its attribute.
FORWARD_OPTIONS = {"forward_times": "times", "nft_beta": "beta", "old_policy_decay": "decay"}
# What a user may set; the chain says the rest.
PLAN_OPTIONS = (
    *(f.name for f in dataclasses.fields(EstimatorPlan) if f.name not in ("num_steps", "silent_steps", "forward")),
    *FORWARD_OPTIONS,
)


def _with_options(name: str, forward: ForwardProcess, given: dict[str, Any]) -> ForwardProcess:
    """The loss of a preset with the options that a user gave.

    Raises:
        PlanError: an option of estimators of steps, or a value that cannot be.
    """
    for option in given.keys() - FORWARD_OPTIONS.keys():
        raise PlanError(
            f"{option}={given[option]!r}: has no effect with estimator={name!r}, a loss on the forward process that estimates no step of the "
            "chain; leave it unset, or choose another estimator"
        )
    count, beta, decay = forward.steps[1] - forward.steps[0], given.get("nft_beta"), given.get("old_policy_decay")
    decay = tuple(decay) if isinstance(decay, list) else decay
    times = given.get("forward_times", forward.times)
    for option, holds, rule in (
        (
            "forward_times",
            _is_whole(times) and 1 <= times <= count,
            f"must be a whole number from 1 to {count}, the noise levels it may use",
        ),
        ("nft_beta", beta is None or forward.loss == "nft", f"is of estimator='nft', but estimator={name!r}; leave it unset"),
        ("nft_beta", beta is None or 0 < beta < math.inf, "must be a positive number, for instance 1"),
        (
            "old_policy_decay",
            decay is None or forward.loss == "nft",
            f"is of estimator='nft', but estimator={name!r}; leave it unset",
        ),
        (
            "old_policy_decay",
            decay is None or (len(decay) == 3 and min(decay) >= 0 and decay[0] < math.inf and decay[1] < math.inf and decay[2] < 1),
            "must be three numbers, [flat, rate, limit], none negative, the limit below 1",
        ),
    ):
        if not holds:
            raise PlanError(f"{option}={given[option]!r}: {rule}")
    found = {FORWARD_OPTIONS[option]: value for option, value in given.items()}
    return dataclasses.replace(forward, **found | ({} if decay is None else {"decay": decay}))


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_whole(number) for number in value)


def _are_weights(value: Any, count: int) -> bool:
    """So many finite numbers, none negative and not all 0."""
    if not isinstance(value, tuple) or len(value) != count:
        return False
    return all(isinstance(weight, Real) and 0 <= float(weight) < math.inf for weight in value) and sum(value) > 0


def _rules(plan: EstimatorPlan) -> Iterator[tuple[str, bool, str]]:
    """(option, whether it is as it must be, the rule and the way out). A rule may rely on those before it."""
    steps, length = plan.num_steps, plan.ho_length
    yield "num_steps", _is_whole(steps) and steps >= 1, "must be a whole number: a chain has at least one step"
    yield "fo_steps", _is_pair(plan.fo_range), "K must be a whole number, or a pair (low, high) of whole numbers"
    low, high = plan.fo_range
    in_order = 0 <= low <= high <= steps
    yield "fo_steps", in_order, f"K must lie between 0 and the number of steps, {steps}; a pair (low, high) needs low <= high"
    left = f"num_steps - fo_steps = {steps} - {high} = {steps - high}"
    rule = f"h must be a whole number from 0 to what first order leaves, {left}; shorten it or lower fo_steps"
    yield "ho_length", _is_whole(length) and 0 <= length <= steps - high, rule
    yield "fo_steps", low == high or not length, f"a random K needs ho_length=0, but it is {length}"
    yield from _start_rules(plan)
    yield from _rest_rules(plan)
    for name in ("fo_weight", "ho_weight", "rest_weight"):
        yield name, math.isfinite(getattr(plan, name)), "must be a finite number (1 is the gradient)"
    yield "zo_scale", 0 < plan.zo_scale < math.inf, "the perturbation scale must be a positive number, for instance 0.01"
    silent = plan.silent_estimator
    rule = "must be 'none' (leave steps without noise out), 'ho' (half-order segments), or unset (refuse them)"
    yield "silent_estimator", silent in (None, "none", "ho"), rule
    covers = silent != "ho" or plan.rest_estimator == "lr"
    yield (
        "silent_estimator",
        covers,
        f"segments end at likelihood-ratio steps, but rest_estimator={plan.rest_estimator!r}; use 'lr'",
    )
    number = plan.zo_num_perturbations
    yield "zo_num_perturbations", _is_whole(number) and number >= 1, "must be a whole number, at least 1 per batch"


def _start_rules(plan: EstimatorPlan) -> Iterator[tuple[str, bool, str]]:
    start, weights, count = plan.ho_start, plan.ho_start_weights, plan.num_starts
    is_known = start in NAMED_STARTS if isinstance(start, str) else _is_pair(start)
    yield "ho_start", is_known, f"must be one of {NAMED_STARTS}, or two step numbers [first, last] (weights: ho_start_weights)"
    yield "ho_start", weights is None or start == "uniform", "ho_start_weights is set as well; leave one of them unset"
    has_chain, without = plan.ho_length > 0, "has no effect without a sub-chain; set ho_length to at least 1"
    yield "ho_start", has_chain or isinstance(start, str), without
    yield "ho_start_weights", has_chain or weights is None, without
    lengths = f"num_steps={plan.num_steps}, fo_steps={plan.fo_range[1]}, ho_length={plan.ho_length}"
    is_inside = isinstance(start, str) or 0 <= start[0] <= start[1] < count
    yield "ho_start", is_inside, f"starts lie within 0..{count - 1}, the first not after the last ({lengths})"
    rule = f"must be one non-negative number per admissible start, {count} of them ({lengths}), not all 0; a range is ho_start"
    yield "ho_start_weights", weights is None or _are_weights(weights, count), rule


def _rest_rules(plan: EstimatorPlan) -> Iterator[tuple[str, bool, str]]:
    rest, count, weights = plan.rest_estimator, plan.rest_num_steps, plan.rest_step_weights
    yield "rest_estimator", rest in REST_ESTIMATORS, f"must be one of {tuple(REST_ESTIMATORS)}"
    for name in ("rest_num_steps", "rest_step_weights"):
        is_used = getattr(plan, name) is None or rest in ("lr", "prediction")
        yield name, is_used, f"has no effect with rest_estimator={rest!r}; use 'lr'"
    fits = count is None or (_is_whole(count) and 1 <= count <= max(plan.num_rest_steps, 1))
    yield "rest_num_steps", fits, f"must lie between 1 and the number of remaining steps, {plan.num_rest_steps}; unset visits all"
    yield "rest_step_weights", weights is None or count is not None, "has no effect when every step is visited; set rest_num_steps"
    rule = f"must be one positive finite weight per step, {plan.num_steps} of them (of weight 0, a step would never be estimated)"
    yield "rest_step_weights", weights is None or (_are_weights(weights, plan.num_steps) and min(weights) > 0), rule
    is_scored = rest == "lr" or plan.ho_length > 0
    yield "control_variate", is_scored or not plan.control_variate, "no step has a likelihood ratio; use rest_estimator='lr'"
