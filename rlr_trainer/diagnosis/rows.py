"""From the updates of a comparison to the rows of its table, the recommendation, and notes on what it was too short for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlr_trainer.diagnosis.comparison import Comparison, Measured
from rlr_trainer.diagnosis.plans import LONG_FO_SHARE, YOURS
from rlr_trainer.diagnosis.result import TIE, PlanRow, Recommendation, format_bias, format_estimate
from rlr_trainer.diagnosis.statistics import (
    EXACTLY_ONE,
    MINIMUM_BATCHES,
    RESOLVED,
    UNKNOWN,
    Estimate,
    Products,
    RelativeBias,
    captured,
    jackknife,
    judge_bias,
    largest_share,
    product_of_powers,
    reference_square,
    total_variance,
)
from rlr_trainer.diagnosis.step_profile import ProfileBuilder, StepCost

ENOUGH_BATCHES = 10  # with fewer, an error of the error hides what is better; then nobody is advised to change the plan
DETECTABLE = 0.5  # relative bias that must not go unseen where the report says "none seen"
CONTRADICTION = 4.0  # standard errors of bias that it takes to doubt a plan which is unbiased by construction
# standard errors of the reference's squared norm above 0 at which numbers relative to it are given (verdicts take more)
GLIMPSED = 2.0
HACKING = (
    "risk: long first-order parts and one-step predictions find a reward's blind spots fastest, and nothing in this measurement shows it: "
    "train with them only beside an independent judge"
)


def evaluate(comparison: Comparison, costs: Mapping[str, StepCost]) -> list[PlanRow]:
    """Rows of all measured candidates, the most efficient first, with their speed relative to the configured plan."""
    rows = [_row(comparison, entry, costs) for entry in comparison.measured]
    own = next((row for row in rows if row.is_yours), None)
    rows = [dataclasses.replace(row, speed=_speed(row, own)) for row in rows]
    return sorted(rows, key=lambda row: -(row.efficiency.value or -1.0))


def _row(comparison: Comparison, entry: Measured, costs: Mapping[str, StepCost]) -> PlanRow:
    candidate, plan = entry.candidate, entry.candidate.plan
    products, seconds = comparison.products(entry), comparison.seconds(entry, costs)
    is_reference, comparable = comparison.is_reference(entry), comparison.has_reference(entry)
    by_construction = not plan.biases() or candidate.only_smoothed  # the captured share is known to be 1
    variance, square = jackknife(total_variance, products), jackknife(reference_square, products)
    known = square if square.exceeds(GLIMPSED) and comparable else UNKNOWN
    share = EXACTLY_ONE if is_reference else UNKNOWN if known is UNKNOWN else jackknife(captured, products)
    bias = judge_bias(products, DETECTABLE, CONTRADICTION if by_construction else RESOLVED)
    if not comparable:
        bias = RelativeBias(None, None, None, "underpowered")
    if is_reference:
        bias = RelativeBias(None, None, 0.0, "reference")
    efficiency = product_of_powers((EXACTLY_ONE if by_construction else share, 2), (variance, -1), (Estimate(seconds, 0.0), -1))
    return PlanRow(
        name=candidate.name,
        options=candidate.options,
        is_yours=plan == comparison.bench.plan and candidate.schedule is None,
        sampled_otherwise=candidate.schedule is not None,
        fo_steps=plan.fo_range[1],
        ho_length=plan.ho_length,
        fo_share=plan.fo_range[1] / plan.num_steps,
        biases=plan.biases(),
        only_smoothed=candidate.only_smoothed,
        num_batches=products.num_batches,
        bias=bias,
        captured=share,
        std=product_of_powers((variance, 0.5)),
        largest_share=largest_share(products),
        seconds=seconds,
        peak_bytes=comparison.peak_bytes(entry, costs),
        efficiency=efficiency,
        signal_per_second=product_of_powers((efficiency, 1), (known, 1)),
        speed=UNKNOWN,
    )


def _speed(row: PlanRow, own: PlanRow | None) -> Estimate:
    """Efficiency over that of the configured plan, where the latter is known."""
    if own is None or not (own.is_unbiased or own.only_smoothed or own.captured.resolved):
        return UNKNOWN
    if own.name == row.name and own.efficiency.value is not None:
        return EXACTLY_ONE
    return product_of_powers((row.efficiency, 1), (own.efficiency, -1))


def about_reference(comparison: Comparison) -> dict[str, Any]:
    """What the rows are relative to, and how well it is known."""
    updates = torch.stack(list(comparison.reference.values()))
    square = jackknife(reference_square, Products.of(updates, updates))
    return {
        "reference": _reference_name(comparison.builder),
        "reference_batches": len(updates),
        "reference_norm": math.sqrt(square.value or 0.0) if square.exceeds(GLIMPSED) else None,
        "reference_resolved": square.resolved,
    }


def _reference_name(builder: ProfileBuilder) -> str:
    if builder.differentiable:
        return "pathwise (full_bp)"
    return "likelihood ratio (ddpo)" + (
        f", without the share of {len(builder.silent)} steps that add no noise" if builder.silent else ""
    )


def notes_on_power(rows: Sequence[PlanRow], settings: Mapping[str, Any]) -> list[str]:
    """What the measurement was too short for."""
    enough = "the efficiencies compare the noise of unbiased plans, for which that is enough"
    reference = f"after {settings['reference_batches']} batches the reference gradient"
    unclear = [row.name for row in rows if row.bias.verdict == "underpowered"]
    few = [row.name for row in rows if row.num_batches < MINIMUM_BATCHES]
    rare = [f"{row.name} ({row.largest_share:.0%})" for row in rows if row.is_heavy_tailed]
    notes = []
    if not settings["reference_resolved"]:
        notes.append(f"underpowered: {reference} does not stand out of its noise, so there is no verdict on bias; {enough}")
    elif unclear:
        notes.append(f"underpowered: a bias of {DETECTABLE:.0%} or more could hide behind the noise of {', '.join(unclear)}")
    if few:
        notes.append(f"fewer than {MINIMUM_BATCHES} batches, too few for errors to be believed: {', '.join(few)}")
    if rare:
        notes.append(f"most of the measured variance comes from one batch, so std and signal/s are rough: {', '.join(rare)}")
    if settings["configured_advantage"] != settings["advantage"]:
        notes.append(
            f"measured with advantage={settings['advantage']!r}; the configured {settings['configured_advantage']!r} rescales the update"
        )
    if not any(row.is_yours for row in rows):
        notes.append(f"the configured plan ({YOURS}) was not measured, so no speed is given relative to it")
    return notes


def recommend(rows: list[PlanRow]) -> Recommendation:
    """The unbiased plan with the most signal per second among those with first order on at most half of the chain; yours, if it is
    unbiased and none of them is better beyond doubt.

    Of plans that are equally good within the errors, the one with the fewest first-order steps. Biased plans are never chosen, nor long
    first order, whose risk (reward hacking) does not show in bias and variance, nor a plan that measured worse than yours; the first two are
    mentioned where they measured better.
    """
    usable = [
        row for row in rows if row.efficiency.value is not None and row.num_batches >= MINIMUM_BATCHES and not row.sampled_otherwise
    ]
    wrong = [row.name for row in usable if row.is_unbiased and row.bias.verdict == "biased"]
    sound = [row for row in usable if row.is_unbiased and row.name not in wrong]
    short = [row for row in sound if row.fo_share <= LONG_FO_SHARE]
    remarks = []
    if wrong:
        remarks.append(
            f"{', '.join(wrong)}: unbiased by construction, yet measured as biased. Look for a part of the reward that is cut from its graph "
            "(detach, rounding, a threshold, another precision), or for a network that is not smooth"
        )
    own = next((row for row in sound if row.is_yours), None)
    worth = (
        [row for row in short if not _is_worse_than_yours(row)] if own is None else [r for r in short if _is_clearly_better(r, own)]
    )
    if own is None and not worth:
        return Recommendation(None, {}, f"No recommendation: {_why_none(wrong, sound, short)}.", remarks)
    best = max(worth, key=_efficiency) if worth else own
    assert best is not None
    equal = [row for row in worth if _efficiency(row) + TIE * _error(row, best) >= _efficiency(best)]
    chosen = min(
        equal,
        key=lambda row: (row.fo_steps, bool(row.options.get("control_variate")), row.ho_length, -_efficiency(row)),
        default=best,
    )
    remarks += _passed_over(rows, usable, sound, chosen)
    promising = [row for row in short if own is not None and _efficiency(row) > _efficiency(own)]
    if chosen is own and promising:
        return Recommendation(own.name, own.options, _not_enough(own, max(promising, key=_efficiency)), remarks)
    return Recommendation(chosen.name, chosen.options, _reason(chosen, best, len(short), len(equal)), remarks)


def _is_worse_than_yours(row: PlanRow) -> bool:
    return row.speed.value is not None and row.speed.value < 1


def _is_clearly_better(row: PlanRow, own: PlanRow) -> bool:
    """Whether the batches suffice to advise the change from one plan to another."""
    enough = min(row.num_batches, own.num_batches) >= ENOUGH_BATCHES and not row.is_heavy_tailed and not own.is_heavy_tailed
    return enough and _efficiency(row) - RESOLVED * _error(row, own) > _efficiency(own)


def _passed_over(rows: list[PlanRow], usable: list[PlanRow], sound: list[PlanRow], chosen: PlanRow) -> list[str]:
    """What measured better than the chosen plan and is not recommended, and why."""
    better = [row for row in usable if _efficiency(row) > _efficiency(chosen)]
    long = [row for row in better if row in sound and row.fo_share > LONG_FO_SHARE]
    biased = [row for row in better if not row.is_unbiased and not row.only_smoothed and row.captured.resolved]
    remarks = []
    if long:
        row = max(long, key=_efficiency)
        remarks.append(f"not recommended for its risk: {row.name} (K={row.fo_steps}), unbiased, with {_times(row, chosen)}")
    if biased:
        row = max(biased, key=_efficiency)
        remarks.append(
            f"biased alternative: {row.name} has {_times(row, chosen)} and captures {format_estimate(row.captured)} of the gradient, but is "
            f"biased by construction ({'; '.join(row.biases)}); measured bias over the gradient's norm: {format_bias(row.bias)}"
        )
    other = [row for row in rows if row.sampled_otherwise and row.num_batches >= MINIMUM_BATCHES]
    elsewhere = [row for row in other if _efficiency(row) > _efficiency(chosen)]
    if elsewhere:
        row = max(elsewhere, key=_efficiency)
        remarks.append(
            f"with other noise: {row.name} has {_times(row, chosen)}, each relative to the gradient of the pictures that its own sampler makes; "
            f"the options are {', '.join(f'{name}={value!r}' for name, value in row.options.items())}"
        )
    if long or biased or chosen.fo_share > LONG_FO_SHARE:
        remarks.append(HACKING)
    return remarks


def _not_enough(own: PlanRow, best: PlanRow) -> str:
    rough = " with most of a variance from one batch," if best.is_heavy_tailed or own.is_heavy_tailed else ""
    return (
        f"Not enough data for another plan, keep yours ({own.name}): the best of the others, {best.name}, measured "
        f"{format_estimate(best.speed)} times its signal per second,{rough} on {min(best.num_batches, own.num_batches)} batches. A change "
        f"takes {ENOUGH_BATCHES} batches and a difference of {RESOLVED:g} standard errors; give a longer time_limit (or larger num_batches)."
    )


def _reason(chosen: PlanRow, best: PlanRow, count: int, equal: int) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in chosen.options.items())
    merit = f"none is better beyond the errors of measurement ({equal} are equal), and it has the fewest first-order steps"
    if chosen is best:
        merit = "it has the most signal per second"
    times = "an unknown number of" if chosen.speed.value is None else format_estimate(chosen.speed)
    speed = "it is your plan" if chosen.is_yours else f"{times} times that of your plan"
    return (
        f"Recommended: {chosen.name} ({options}), because of the {count} unbiased plans with first order on at most half of the chain "
        f"{merit}: {speed}."
    )


def _why_none(wrong: list[str], sound: list[PlanRow], short: list[PlanRow]) -> str:
    if wrong:
        return "what should be unbiased measured as biased, so the reward's gradient cannot be relied on (see below)"
    if short:
        return "your plan is biased, and every unbiased one measured less signal per second; keep yours if its bias is wanted"
    if sound:
        return "the only unbiased plans here have first order on more than half of the chain, whose risk is not measured"
    return (
        f"not enough data, keep yours; no unbiased plan was measured on {MINIMUM_BATCHES} batches or more, so give a longer time_limit (or "
        "larger num_batches)"
    )


def _efficiency(row: PlanRow) -> float:
    return row.efficiency.value or 0.0


def _times(row: PlanRow, chosen: PlanRow) -> str:
    return f"{_efficiency(row) / _efficiency(chosen):.2g} times the signal per second of {chosen.name}"


def _error(left: PlanRow, right: PlanRow) -> float:
    return math.hypot(left.efficiency.error or 0.0, right.efficiency.error or 0.0)
