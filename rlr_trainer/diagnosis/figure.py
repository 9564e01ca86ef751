"""The figure of a diagnosis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlr_trainer.diagnosis.plans import LONG_FO_SHARE
from rlr_trainer.diagnosis.result import Diagnosis, PlanRow
from rlr_trainer.diagnosis.step_profile import VarianceProfile

UNBIASED, LONG, BIASED, SMOOTHED = "#1f5fa8", "#8fb3dc", "#c23b22", "#9a9a9a"
KINDS = {
    UNBIASED: "unbiased",
    LONG: f"unbiased, first order on more than {LONG_FO_SHARE:.0%} of the chain",
    BIASED: "biased by construction",
    SMOOTHED: "unbiased for the smoothed objective",
}


def plot(diagnosis: Diagnosis, path: str | Path) -> None:
    """Writes the figure to `path` (the ending says the format)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    plans, steps, lengths = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    _plot_plans(plans, diagnosis.rows)
    _plot_steps(steps, diagnosis.profile)
    _plot_lengths(lengths, diagnosis.profile)
    settings = diagnosis.settings
    figure.suptitle(f"{settings['num_steps']} steps, {settings['samples_per_update']} samples per update, {settings['device']}")
    figure.savefig(path, dpi=120)


def _color(row: PlanRow) -> str:
    if row.is_unbiased:
        return LONG if row.fo_share > LONG_FO_SHARE else UNBIASED
    return SMOOTHED if row.only_smoothed else BIASED


def _plot_plans(axes: Any, rows: list[PlanRow]) -> None:
    unit = "signal_per_second" if any(row.signal_per_second.value for row in rows) else "efficiency"
    shown = [row for row in reversed(rows) if (getattr(row, unit).value or 0) > 0]
    for place, row in enumerate(shown):
        estimate = getattr(row, unit)
        axes.barh(place, estimate.value, color=_color(row), xerr=estimate.error, ecolor="black", capsize=2)
    for color in dict.fromkeys(_color(row) for row in shown):
        axes.barh(0, 0, color=color, label=KINDS[color])
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    if shown:
        axes.set_xscale("log")
        values = [getattr(row, unit).value for row in shown]
        axes.set_xlim(min(values) / 3, max(values) * 3)
        axes.legend(fontsize=8, loc="lower right")
    axes.set_xlabel("squared signal-to-noise ratio per second" + ("" if unit == "signal_per_second" else " (arbitrary unit)"))
    axes.set_ylabel("plan")
    axes.grid(alpha=0.3, axis="x")


def _plot_steps(axes: Any, profile: VarianceProfile) -> None:
    curves = ((profile.lr_variance, "o-", UNBIASED, "likelihood ratio"), (profile.fo_variance, "s-", BIASED, "first order"))
    for values, style, color, label in curves:
        points = [(step, v**0.5) for step, v in enumerate(values) if v is not None and v > 0]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, label=label)
    axes.set_xlabel("step, from the noisy end")
    axes.set_ylabel("standard deviation of a step's share, per sample")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.set_yscale("log")
        axes.legend(fontsize=8)


def _plot_lengths(axes: Any, profile: VarianceProfile) -> None:
    totals = enumerate(zip(profile.total_variance, profile.total_variance_error, strict=True))
    points = [(k, value, error or 0.0) for k, (value, error) in totals if value]
    if points:
        k, values, errors = zip(*points, strict=True)
        axes.errorbar(k, values, yerr=errors, fmt="o-", color=UNBIASED, capsize=2)
        axes.set_yscale("log")
    axes.set_xlabel("K, first-order steps at the end of the chain")
    axes.set_ylabel("variance of FO(K) + LR on the rest, per sample")
    axes.grid(alpha=0.3)
