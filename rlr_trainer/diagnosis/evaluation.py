"""From the updates of a comparison to the rows of its report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlr_trainer.diagnosis.candidates import YOURS, Candidate
from rlr_trainer.diagnosis.comparison import Comparison, Measured
from rlr_trainer.diagnosis.profile import StepCost
from rlr_trainer.diagnosis.report import PlanRow
from rlr_trainer.diagnosis.statistics import (
    MINIMUM_BATCHES,
    RESOLVED,
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
    reference_square,
    relative_std,
    total_variance,
    unbiased_precision,
)
from rlr_trainer.estimators.plan import EstimatorPlan

DETECTABLE = 0.5  # relative bias that must not go unseen where the report says "none seen"
CONTRADICTION = 4.0  # standard errors of bias that it takes to doubt a plan which is unbiased by construction
GLIMPSED = (
    2.0  # standard errors of the reference's squared norm above 0 at which numbers relative to it are given (verdicts take more)
)
PACKAGES = ("torch", "transformers", "diffusers", "trl", "peft")
UNKNOWN = Estimate(None, None)


def evaluate(comparison: Comparison, costs: Mapping[str, StepCost], own_plan: EstimatorPlan) -> list[PlanRow]:
    """Rows of all measured candidates, the most efficient first.

    Args:
        costs: of the steps.
        own_plan: the configured plan.
    """
    rows = []
    for entry in comparison.measured:
        row = _row(entry.candidate, Products.of(*comparison.matrices(entry)), comparison, entry, costs)
        rows.append(dataclasses.replace(row, is_yours=entry.candidate.plan == own_plan))
    own = next((row for row in rows if row.is_yours), None)
    return sorted((_with_speed(row, own) for row in rows), key=lambda row: -(row.efficiency.value or -1.0))


def _row(
    candidate: Candidate, products: Products, comparison: Comparison, entry: Measured, costs: Mapping[str, StepCost]
) -> PlanRow:
    plan = candidate.plan
    seconds = comparison.seconds(entry, costs)
    is_reference = plan == comparison.builder.plan
    assumes_captured = not plan.biases() or candidate.only_smoothed
    reference = jackknife(reference_square, products)
    variance = jackknife(total_variance, products)
    known = reference.exceeds(GLIMPSED)
    share = jackknife(captured, products) if known else UNKNOWN
    signal = jackknife(unbiased_precision if assumes_captured else precision, products) if known else UNKNOWN
    return PlanRow(
        name=candidate.name,
        options=candidate.options,
        is_yours=False,
        fo_steps=plan.fo_range[1],
        ho_length=plan.ho_length,
        fo_share=candidate.fo_share,
        biases=plan.biases(),
        only_smoothed=candidate.only_smoothed,
        num_batches=products.num_paired,
        bias=RelativeBias(None, None, 0.0, "reference")
        if is_reference
        else judge_bias(products, DETECTABLE, CONTRADICTION if assumes_captured else RESOLVED),
        captured=Estimate(1.0, 0.0) if is_reference else share,
        std=_root(variance),
        largest_share=largest_share(products),
        relative_std=jackknife(relative_std, products) if known else UNKNOWN,
        cosine_of_mean=Estimate(1.0, 0.0) if is_reference else _cosine_of_mean(products, reference),
        cosine_of_one=jackknife(cosine_of_one, products) if known else UNKNOWN,
        seconds=seconds,
        peak_bytes=comparison.peak_bytes(entry, costs),
        efficiency=_efficiency(variance, None if assumes_captured else share, seconds),
        signal_per_second=_over(signal, seconds),
        speed=UNKNOWN,
    )


def _cosine_of_mean(products: Products, reference: Estimate) -> Estimate:
    """Unknown where the candidate's own mean does not stand out of its noise: the cosine would be a ratio of noises."""
    own = jackknife(mean_square, products)
    return jackknife(cosine_of_mean, products) if own.resolved and reference.exceeds(GLIMPSED) else UNKNOWN


def _efficiency(variance: Estimate, share: Estimate | None, seconds: float | None) -> Estimate:
    """captured^2 / (variance * seconds); `share` None stands for 1."""
    if variance.value is None or not variance.value > 0 or not seconds:
        return UNKNOWN
    relative = (variance.error or math.nan) / variance.value
    factor = 1.0
    if share is not None:
        if share.value is None or share.error is None or share.value <= 0:
            return UNKNOWN
        factor = share.value**2
        relative = math.hypot(relative, 2 * share.error / share.value)
    value = factor / (variance.value * seconds)
    return Estimate.of(value, relative * value)


def _with_speed(row: PlanRow, own: PlanRow | None) -> PlanRow:
    """The row with its efficiency over that of the configured plan, where the latter is known."""
    if own is None or row.efficiency.value is None or own.efficiency.value is None:
        return row
    if own.name == row.name:
        return dataclasses.replace(row, speed=Estimate(1.0, 0.0))
    if not (own.assumes_captured or own.captured.resolved):
        return row
    value = row.efficiency.value / own.efficiency.value
    errors = [(e.error or math.nan) / e.value for e in (row.efficiency, own.efficiency) if e.value]
    return dataclasses.replace(row, speed=Estimate.of(value, value * math.hypot(*errors)))


def _root(square: Estimate) -> Estimate:
    if square.value is None or square.value < 0:
        return UNKNOWN
    root = math.sqrt(square.value)
    return Estimate(root, None if square.error is None or root == 0 else square.error / (2 * root))


def _over(estimate: Estimate, seconds: float | None) -> Estimate:
    if estimate.value is None or not seconds:
        return UNKNOWN
    return Estimate(estimate.value / seconds, None if estimate.error is None else estimate.error / seconds)


def describe(comparison: Comparison) -> dict[str, Any]:
    """What was measured, on what."""
    bench, gradients = comparison.bench, torch.stack(list(comparison.reference.values()))
    reference = jackknife(reference_square, Products.of(gradients, gradients))
    config = bench.trainer.args
    return {
        "num_steps": bench.num_steps,
        "samples_per_update": bench.samples_per_update,
        "sample_batch_size": bench.config.sample_batch_size,
        "guidance_scale": config.sample_guidance_scale,
        "eta": config.sample_eta,
        "advantage": bench.config.advantage,
        "configured_advantage": config.advantage_name,
        "recompute": config.recompute,
        "num_parameters": bench.reader.num_entries,
        "sketched_to": bench.reader.size if bench.reader.sketched else None,
        "reference": "pathwise (full_bp)" if comparison.builder.plan.fo_range[1] else "likelihood ratio (ddpo)",
        "reference_batches": len(gradients),
        "reference_norm": math.sqrt(reference.value or 0.0) if reference.exceeds(GLIMPSED) else None,
        "reference_resolved": reference.resolved,
        "weights": "at update " + str(bench.trainer.state.global_step),
        "seed": config.seed,
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
    }


def power_notes(rows: Sequence[PlanRow], settings: Mapping[str, Any]) -> list[str]:
    """What the measurement was too short for."""
    notes = []
    batches = settings["reference_batches"]
    if settings["reference_norm"] is None:
        notes.append(
            f"underpowered: the reference gradient itself does not stand out of its noise after {batches} batches, so nothing relative to it "
            "is given; the efficiencies compare the noise of unbiased plans, for which that is enough"
        )
    elif not settings["reference_resolved"]:
        notes.append(
            f"underpowered: the reference gradient barely stands out of its noise after {batches} batches, so what is relative to it is "
            "rough, and there is no verdict on bias; the efficiencies compare the noise of unbiased plans, for which that is enough"
        )
    else:
        unclear = [row.name for row in rows if row.bias.verdict == "underpowered"]
        if unclear:
            notes.append(
                f"underpowered: a bias of {DETECTABLE:.0%} or more could hide behind the noise of {', '.join(unclear)}; by construction they "
                "are what the table's second column says"
            )
    few = [row.name for row in rows if row.num_batches < MINIMUM_BATCHES]
    if few:
        notes.append(f"fewer than {MINIMUM_BATCHES} batches, too few for errors to be believed: {', '.join(few)}")
    rare = [f"{row.name} ({row.largest_share:.0%})" for row in rows if row.is_heavy_tailed and row.largest_share is not None]
    if rare:
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


def package_versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that the numbers depend on."""
    from rlr_trainer import __version__

    versions = {"python": platform.python_version(), "rlr_trainer": __version__}
    return versions | {name: importlib.metadata.version(name) for name in PACKAGES}
