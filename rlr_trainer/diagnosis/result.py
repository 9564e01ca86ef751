"""What a diagnosis found: rows, table, recommendation, and JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rlr_trainer.diagnosis.statistics import MINIMUM_BATCHES, Estimate, RelativeBias
from rlr_trainer.diagnosis.step_profile import StepCost, VarianceProfile
from rlr_trainer.diagnosis.windows import Window, choose_window

MEGABYTE = 2**20
TIE = 2.0  # standard errors within which two plans count as equally good
HEAVY = 0.5  # share of the variance in one batch from which the std is called rough


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One plan's measurements. An `Estimate` has None where the data do not say.

    Attributes:
        name, options, is_yours: the plan, the options of `RLRConfig` that make it, whether it is the configured one.
        sampled_otherwise: whether its options change the sampler: then its columns are relative to the gradient under that sampler.
        fo_steps, ho_length, fo_share: K (the largest, if random), h, and K / T.
        biases, only_smoothed: why it is biased by construction, and whether zeroth order's smoothing is the only reason.
        num_batches: updates measured.
        bias: distance of the mean update from the reference gradient, over the latter's norm.
        captured: share of the reference gradient that the mean update contains, along the reference; 1 if unbiased.
        std: square root of the total variance of one update, in gradient units.
        largest_share: of the total variance, that of the batch which deviates most; about 1 / num_batches without heavy tails.
        seconds, peak_bytes: wall time of one update, and its most memory beyond the weights; None: not measured.
        efficiency: (captured / std)^2 per second, captured = 1 for plans that are unbiased or only smoothed; ranks the plans.
        signal_per_second: efficiency * |reference|^2, the squared signal-to-noise ratio gained per second.
        speed: efficiency over that of the configured plan.
    """

    name: str
    options: dict[str, Any]
    is_yours: bool
    sampled_otherwise: bool
    fo_steps: int
    ho_length: int
    fo_share: float
    biases: list[str]
    only_smoothed: bool
    num_batches: int
    bias: RelativeBias
    captured: Estimate
    std: Estimate
    largest_share: float | None
    seconds: float | None
    peak_bytes: int | None
    efficiency: Estimate
    signal_per_second: Estimate
    speed: Estimate

    @property
    def is_unbiased(self) -> bool:
        return not self.biases

    @property
    def is_heavy_tailed(self) -> bool:
        """Whether the std is, for the most part, that of a single batch."""
        return self.num_batches >= MINIMUM_BATCHES and self.largest_share is not None and self.largest_share > HEAVY


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """What to use, and what was set aside.

    Attributes:
        plan, options: of the recommended row; None and empty: the measurement does not allow a recommendation.
        reason, remarks: one sentence; alternatives and reservations.
    """

    plan: str | None
    options: dict[str, Any]
    reason: str
    remarks: list[str]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`.

    Attributes:
        rows: one per plan, most signal per second first.
        profile: noise of every step's share.
        windows: noise in the first steps alone; empty where fewer than two batches were measured or the first step adds no noise.
        step_costs: time and memory of one step of each kind; see `measure_step_costs`.
        recommendation: what to use.
        settings, versions: what was measured, on what, with which packages.
        notes: what was left out, and why.
    """

    rows: list[PlanRow]
    profile: VarianceProfile
    windows: list[Window]
    step_costs: dict[str, StepCost]
    recommendation: Recommendation
    settings: dict[str, Any]
    notes: list[str]
    versions: dict[str, str]

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)

    def row(self, name: str) -> PlanRow:
        """The row of a plan, by its name with or without "(yours)".

        Raises:
            KeyError: no such row.
        """
        for row in self.rows:
            if name in (row.name, row.name.removesuffix(" (yours)")):
                return row
        raise KeyError(f"{name!r} was not measured; there are {', '.join(row.name for row in self.rows)}")

    def table(self) -> str:
        """As text: the comparison, the steps, the recommendation."""
        lines = [*_align(_plan_cells(self.rows)), "", *LEGEND, "", *_align(_step_cells(self.profile)), ""]
        if self.windows:
            lines += [*_align(_window_cells(self.windows)), *WINDOW_LEGEND, ""]
        lines += [*_align(_cost_cells(self.step_costs)), "", self.recommendation.reason]
        lines += [f"- {remark}" for remark in [*self.recommendation.remarks, *self.notes]]
        return "\n".join(lines)


LEGEND = (
    "bias: distance of the mean update from the reference gradient, over its norm; < x: none seen, and less than x; ?: the batches do",
    "not tell. captured: share of the reference in the mean update. std: of one update (x?: mostly of a single batch). s, MB: of one",
    "update, memory beyond the weights. signal/s: squared signal-to-noise ratio gained per second; x yours: over that of the configured",
    "plan. n: updates measured.",
)


WINDOW_LEGEND = (
    "K: first-order steps at the end. The variance is measured with noise in every step. x all: merit over that of the largest window with",
    "the same K; its signal is a model, not a measurement (docs/diagnostics.md).",
)


def _plan_cells(rows: list[PlanRow]) -> list[list[str]]:
    header = ["plan", "in theory", "bias", "captured", "std", "s", "MB", "signal/s", "x yours", "n"]
    return [header] + [
        [
            row.name,
            "unbiased" if row.is_unbiased else "smoothed" if row.only_smoothed else "biased",
            format_bias(row.bias),
            format_estimate(row.captured),
            _number(row.std.value) + ("?" if row.is_heavy_tailed else ""),
            _number(row.seconds),
            _number(None if row.peak_bytes is None else row.peak_bytes / MEGABYTE),
            *map(format_estimate, (row.signal_per_second, row.speed)),
            str(row.num_batches),
        ]
        for row in rows
    ]


def _step_cells(profile: VarianceProfile) -> list[list[str]]:
    header = ["step", "std", "FO variance", "LR variance", "K", "variance of FO(K) + LR(rest)"]
    columns = (profile.stds, profile.fo_variance, profile.lr_variance)
    steps = [[str(step), *map(_number, values)] for step, values in enumerate(zip(*columns, strict=True))]
    totals = map(Estimate, profile.total_variance, profile.total_variance_error)
    lines = zip([*steps, [""] * 4], totals, strict=True)
    return [header] + [[*line, str(k), format_estimate(total)] for k, (line, total) in enumerate(lines)]


def _window_cells(windows: list[Window]) -> list[list[str]]:
    header = ["noise in the first", "K", "std", "s", "x all"]
    chosen, cells = choose_window(windows), [header]
    for window in windows:
        widest = max((w for w in windows if w.fo_steps == windows[0].fo_steps), key=lambda w: w.noise_steps)
        name = f"{window.noise_steps}{' (best)' if window is chosen else ''}"
        numbers = (window.variance**0.5, window.seconds, window.merit / widest.merit)
        cells.append([name, str(window.fo_steps), *map(_number, numbers)])
    return cells


def _cost_cells(costs: dict[str, StepCost]) -> list[list[str]]:
    header = ["one step, one sampling batch", "s", "MB held for backward", "MB at the peak"]
    numbers = {kind: (cost.seconds, cost.held_bytes / MEGABYTE, cost.peak_bytes / MEGABYTE) for kind, cost in costs.items()}
    return [header] + [[kind, *map(_number, values)] for kind, values in numbers.items()]


def _align(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for name, *rest in cells]


def format_bias(bias: RelativeBias) -> str:
    """`0.98 +- 0.03`, `< 0.4`, `< 9?`, `?` or `reference`."""
    if bias.verdict == "reference":
        return "reference"
    if bias.value is not None:
        return format_estimate(Estimate(bias.value, bias.error))
    return "?" if bias.upper is None else f"< {_number(bias.upper)}" + ("?" if bias.verdict == "underpowered" else "")


def format_estimate(estimate: Estimate) -> str:
    """`1.23 +- 0.05`, with a question mark where the error exceeds half of the value."""
    if estimate.value is None:
        return "-"
    if estimate.error is None:
        return f"{_number(estimate.value)}?"
    return f"{_number(estimate.value)} +- {estimate.error:.2g}" + ("?" if abs(estimate.value) < 2 * estimate.error else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
