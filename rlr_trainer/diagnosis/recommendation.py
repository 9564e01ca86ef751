"""From measured rows to a recommendation, with the reservations that belong to it."""

from __future__ import annotations

import math

from rlr_trainer.diagnosis.plans import LONG_FO_SHARE
from rlr_trainer.diagnosis.result import TIE, PlanRow, Recommendation, format_estimate
from rlr_trainer.diagnosis.statistics import MINIMUM_BATCHES

HACKING = (
    "risk: a faithful gradient of a reward is not yet a good picture. Long first-order parts and one-step predictions find the reward's blind "
    "spots fastest, where it has some, and nothing in this measurement shows it: train with them only beside an independent judge"
)


def recommend(rows: list[PlanRow]) -> Recommendation:
    """The unbiased plan with the most signal per second among those with first order on at most half of the chain.

    Of plans that are equally good within the errors, the one with the fewest first-order steps (then the shorter sub-chain, and no
    control variate). Plans that are biased, by construction or as measured, are never chosen, and long first order neither, because
    its risk (reward hacking) does not show in bias and variance; both are mentioned where they measured better.
    """
    usable = [row for row in rows if row.efficiency.value is not None and row.num_batches >= MINIMUM_BATCHES]
    sound = [row for row in usable if row.is_unbiased and row.bias.verdict != "biased"]
    short = [row for row in sound if row.fo_share <= LONG_FO_SHARE]
    remarks = _contradictions(usable)
    if not short:
        return Recommendation(None, {}, _no_recommendation(usable, sound), remarks)
    best = max(short, key=_efficiency)
    equal = [row for row in short if _efficiency(row) + TIE * _error(row, best) >= _efficiency(best)]
    chosen = min(equal, key=lambda row: (row.fo_steps, bool(row.options.get("control_variate")), row.ho_length, -_efficiency(row)))
    better = [row for row in usable if _efficiency(row) > _efficiency(chosen)]
    long = [row for row in better if row in sound and row.fo_share > LONG_FO_SHARE]
    biased = [row for row in better if not row.is_unbiased and not row.only_smoothed and row.captured.resolved]
    if long:
        remarks.append(_long_remark(max(long, key=_efficiency), chosen))
    if biased:
        remarks.append(_biased_remark(max(biased, key=_efficiency), chosen))
    if long or biased:
        remarks.append(HACKING)
    return Recommendation(chosen.name, chosen.options, _reason(chosen, best, len(short), len(equal)), remarks)


def _reason(chosen: PlanRow, best: PlanRow, count: int, equal: int) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in chosen.options.items())
    if chosen is best:
        merit = "it has the most signal per second"
    else:
        merit = f"none is better beyond the errors of measurement ({equal} are equal), and it has the fewest first-order steps"
    if chosen.is_yours:
        yours = "it is your plan"
    elif chosen.speed.value is None:
        yours = "that of your plan is not known"
    else:
        yours = f"{format_estimate(chosen.speed)} times that of your plan"
    return (
        f"Recommended: {chosen.name} ({options}), because of the {count} unbiased plans with first order on at most half of the chain "
        f"{merit}: {yours}."
    )


def _no_recommendation(usable: list[PlanRow], sound: list[PlanRow]) -> str:
    if any(row.is_unbiased and row not in sound for row in usable):
        return "No recommendation: what should be unbiased measured as biased, so the reward's gradient cannot be relied on (see below)."
    if sound:
        return "No recommendation: the only unbiased plans here have first order on more than half of the chain, whose risk is not measured."
    return (
        f"No recommendation: no unbiased plan was measured on {MINIMUM_BATCHES} batches or more; give the diagnosis a longer time_limit (or "
        "larger num_batches)."
    )


def _long_remark(row: PlanRow, chosen: PlanRow) -> str:
    doubt = " (by a std that is mostly of one batch, see below)" if row.is_heavy_tailed else ""
    return f"not recommended for its risk: {row.name} (K={row.fo_steps}), unbiased, with {_times(row, chosen)}{doubt}"


def _biased_remark(row: PlanRow, chosen: PlanRow) -> str:
    bias = row.bias
    if bias.value is not None and bias.error is not None:
        measured = f"its measured bias is {bias.value:.2f} +- {bias.error:.2f} of the gradient's norm"
    elif bias.upper is not None:
        seen = "no bias was seen, one below" if bias.verdict == "none seen" else "its bias could not be resolved: one below"
        measured = f"{seen} {bias.upper:.2g} of the gradient's norm is possible"
    else:
        measured = "its bias could not be measured"
    return (
        f"biased alternative: {row.name} has {_times(row, chosen)} and captures {format_estimate(row.captured)} of the gradient, but is "
        f"biased by construction ({'; '.join(row.biases)}); {measured}"
    )


def _contradictions(rows: list[PlanRow]) -> list[str]:
    """A plan that is unbiased by construction but measured as biased: the reference is then not the gradient of the reward."""
    wrong = [row.name for row in rows if row.is_unbiased and row.bias.verdict == "biased"]
    if not wrong:
        return []
    return [
        f"{', '.join(wrong)}: unbiased by construction, yet measured as biased against the reward's own gradient. Look for a part of the "
        "reward that is cut from its graph (detach, rounding, a threshold, another precision), or for a network that is not smooth: the "
        "likelihood ratio estimates the change of the reward's values, first order follows its graph"
    ]


def _efficiency(row: PlanRow) -> float:
    return row.efficiency.value or 0.0


def _times(row: PlanRow, chosen: PlanRow) -> str:
    return f"{_efficiency(row) / _efficiency(chosen):.2g} times the signal per second of {chosen.name}"


def _error(left: PlanRow, right: PlanRow) -> float:
    return math.hypot(left.efficiency.error or 0.0, right.efficiency.error or 0.0)
