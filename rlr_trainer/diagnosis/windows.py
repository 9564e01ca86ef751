"""Which steps should add noise: windows of the first n steps, judged by what a few batches can tell.

The variance of a gradient is known after two batches; its mean is not after fifty (docs/diagnostics.md has the figures). So the variance
is measured, and for the mean there is a model. The share of step t in the gradient is J_t^T r_t, with J_t the Jacobian of the step's mean
and r_t what a change of the next latent is worth. The likelihood ratio's share has the variance Var(R) tr(J_t J_t^T) / sigma_t^2. If a unit
of the latent is worth the same at every step, the norm of the share is in proportion to sigma_t times that variance's root; and as the
steps share their weights, the shares are taken to point the same way:

    signal(n) = (sum over the covered steps of sigma_t sqrt(v_t))^2,    merit(n) = signal(n) / (variance(n) seconds(n))
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from rlr_trainer.diagnosis.step_profile import ProfileBuilder

TOLERANCE = 0.1  # merits this close (relative) count as equal


@dataclasses.dataclass(frozen=True)
class Window:
    """Noise in the first `noise_steps` steps, with a likelihood ratio each; first order on the last `fo_steps`.

    Attributes:
        signal: of the module's model, in units of its own.
        variance: total variance of one update, in squared gradient units.
        seconds: of one update: sampling, reward, and the backward passes of the covered steps.
        merit: signal / (variance * seconds).
    """

    noise_steps: int
    fo_steps: int
    signal: float
    variance: float
    seconds: float

    @property
    def covered(self) -> int:
        """Steps that have a share in the update."""
        return self.noise_steps + self.fo_steps

    @property
    def merit(self) -> float:
        return self.signal / (self.variance * self.seconds)

    def reason(self, others: Sequence[Window]) -> str:
        """Why it was chosen of `others`, in words."""
        widest = max(others, key=lambda window: window.noise_steps)
        return (
            f"which have {self.merit / widest.merit:.2g} times the modelled signal per variance and second of noise in the first "
            f"{widest.noise_steps} (measured: standard deviation of an update {self.variance**0.5:.2g} against {widest.variance**0.5:.2g}, "
            f"{self.seconds:.2g} s against {widest.seconds:.2g} s)"
        )


def measured_windows(builder: ProfileBuilder, reward_seconds: float) -> list[Window]:
    """All windows of which two batches or more were measured; `reward_seconds` are of one update."""
    if builder.count < 2:
        return []
    spent = {kind: statistics.median(values) if values else 0.0 for kind, values in builder.seconds.items()}
    worth = [std * math.sqrt(v) if v > 0 else 0.0 for std, v in zip(builder.bench.stds, builder.step_variances(), strict=True)]
    found = []
    for (noisy, first_order), variance in zip(builder.windows, builder.window_variances(), strict=True):
        signal = (sum(worth[:noisy]) + sum(worth[len(worth) - first_order :])) ** 2
        backward = noisy * spent["ho"] + first_order * spent["fo"]
        found.append(Window(noisy, first_order, signal, variance, spent["sample"] + reward_seconds + backward))
    return [window for window in found if window.variance > 0]


def choose_window(windows: Sequence[Window]) -> Window:
    """The window of the largest merit; of those within `TOLERANCE` of it, the one that covers the most steps.

    Raises:
        ValueError: there is none.
    """
    if not windows:
        raise ValueError("no window was measured")
    best = max(window.merit for window in windows)
    return max((w for w in windows if w.merit * (1 + TOLERANCE) >= best), key=lambda w: (w.covered, w.merit))
