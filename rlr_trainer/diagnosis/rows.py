"""From the updates of a comparison to the rows of its table, and to the notes on what it was too short for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlr_trainer.diagnosis.comparison import Comparison, Measured
from rlr_trainer.diagnosis.plans import YOURS
from rlr_trainer.diagnosis.result import PlanRow
from rlr_trainer.diagnosis.statistics import (
    EXACTLY_ONE,
    MINIMUM_BATCHES,
    RESOLVED,
    UNKNOWN,
    Estimate,
    Products,
    RelativeBias,
    captured,
    cosine_of_mean,
    cosine_of_one,
    jackknife,
    judge_bias,
    largest_share,
    mean_square,
    precision,
    product_of_powers,
    reference_square,
    relative_std,
    total_variance,
    unbiased_precision,
)
from rlr_trainer.diagnosis.step_profile import StepCost

DETECTABLE = 0.5  # relative bias that must not go unseen where the report says "none seen"
CONTRADICTION = 4.0  # standard errors of bias that it takes to doubt a plan which is unbiased by construction
# standard errors of the reference's squared norm above 0 at which numbers relative to it are given (verdicts take more)
GLIMPSED = 2.0


def evaluate(comparison: Comparison, costs: Mapping[str, StepCost]) -> list[PlanRow]:
    """Rows of all measured candidates, the most efficient first, with their speed relative to the configured plan."""
    rows = [_row(comparison, entry, costs) for entry in comparison.measured]
    own = next((row for row in rows if row.is_yours), None)
    rows = [dataclasses.replace(row, speed=_speed(row, own)) for row in rows]
    return sorted(rows, key=lambda row: -(row.efficiency.value or -1.0))


def _row(comparison: Comparison, entry: Measured, costs: Mapping[str, StepCost]) -> PlanRow:
    candidate, plan = entry.candidate, entry.candidate.plan
    products, seconds = comparison.products(entry), comparison.seconds(entry, costs)
    is_reference = plan == comparison.builder.reference
    assumes_captured = not plan.biases() or candidate.only_smoothed
    variance, own_square = jackknife(total_variance, products), jackknife(mean_square, products)
    known = jackknife(reference_square, products).exceeds(GLIMPSED)

    def relative(statistic: Any, known: bool = known) -> Estimate:
        return jackknife(statistic, products) if known else UNKNOWN

    share = EXACTLY_ONE if assumes_captured else relative(captured)
    bias = judge_bias(products, DETECTABLE, CONTRADICTION if assumes_captured else RESOLVED)
    return PlanRow(
        name=candidate.name,
        options=candidate.options,
        is_yours=plan == comparison.bench.plan,
        fo_steps=plan.fo_range[1],
        ho_length=plan.ho_length,
        fo_share=plan.fo_range[1] / plan.num_steps,
        biases=plan.biases(),
        only_smoothed=candidate.only_smoothed,
        num_batches=products.num_paired,
        bias=RelativeBias(None, None, 0.0, "reference") if is_reference else bias,
        captured=EXACTLY_ONE if is_reference else relative(captured),
        std=product_of_powers((variance, 0.5)),
        largest_share=largest_share(products),
        relative_std=relative(relative_std),
        # where the candidate's own mean does not stand out of its noise, the cosine would be a ratio of noises
        cosine_of_mean=EXACTLY_ONE if is_reference else relative(cosine_of_mean, known and own_square.resolved),
        cosine_of_one=relative(cosine_of_one),
        seconds=seconds,
        peak_bytes=comparison.peak_bytes(entry, costs),
        efficiency=product_of_powers((share, 2), (variance, -1)).over(seconds),
        signal_per_second=relative(unbiased_precision if assumes_captured else precision).over(seconds),
        speed=UNKNOWN,
    )


def _speed(row: PlanRow, own: PlanRow | None) -> Estimate:
    """Efficiency over that of the configured plan, where the latter is known."""
    if own is None or row.efficiency.value is None or own.efficiency.value is None:
        return UNKNOWN
    if own.name == row.name:
        return EXACTLY_ONE
    if not (own.assumes_captured or own.captured.resolved):
        return UNKNOWN
    return product_of_powers((row.efficiency, 1), (own.efficiency, -1))


def about_reference(comparison: Comparison) -> dict[str, Any]:
    """What the rows are relative to, and how well it is known."""
    updates = torch.stack(list(comparison.reference.values()))
    square = jackknife(reference_square, Products.of(updates, updates))
    return {
        "reference": "pathwise (full_bp)" if comparison.builder.differentiable else "likelihood ratio (ddpo)",
        "reference_batches": len(updates),
        "reference_norm": math.sqrt(square.value or 0.0) if square.exceeds(GLIMPSED) else None,
        "reference_resolved": square.resolved,
    }


def notes_on_power(rows: Sequence[PlanRow], settings: Mapping[str, Any]) -> list[str]:
    """What the measurement was too short for."""
    notes = []
    batches = settings["reference_batches"]
    enough = "the efficiencies compare the noise of unbiased plans, for which that is enough"
    if settings["reference_norm"] is None:
        notes.append(
            f"underpowered: the reference gradient itself does not stand out of its noise after {batches} batches, so nothing relative to it "
            f"is given; {enough}"
        )
    elif not settings["reference_resolved"]:
        notes.append(
            f"underpowered: the reference gradient barely stands out of its noise after {batches} batches, so what is relative to it is "
            f"rough, and there is no verdict on bias; {enough}"
        )
    elif unclear := [row.name for row in rows if row.bias.verdict == "underpowered"]:
        notes.append(
            f"underpowered: a bias of {DETECTABLE:.0%} or more could hide behind the noise of {', '.join(unclear)}; by construction they "
            "are what the table's second column says"
        )
    if few := [row.name for row in rows if row.num_batches < MINIMUM_BATCHES]:
        notes.append(f"fewer than {MINIMUM_BATCHES} batches, too few for errors to be believed: {', '.join(few)}")
    if rare := [f"{row.name} ({row.largest_share:.0%})" for row in rows if row.is_heavy_tailed]:
        notes.append(
            f"most of the measured variance comes from one batch: {', '.join(rare)}. Such gradients are rarely large, so this std is rough, "
            "more likely too small than too large, and signal/s the other way round"
        )
    if settings["configured_advantage"] != settings["advantage"]:
        notes.append(
            f"measured with advantage={settings['advantage']!r} for all plans; advantage={settings['configured_advantage']!r}, as configured, "
            "rescales the whole update"
        )
    if not any(row.is_yours for row in rows):
        notes.append(f"the configured plan ({YOURS}) was not measured, so no speed is given relative to it")
    return notes
