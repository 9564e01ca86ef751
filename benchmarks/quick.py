"""A small comparison with assertions, in minutes: `python benchmarks/quick.py`, or `make benchmark-quick`.

The digit task on the bundled digits model, 16 updates at 1e-2, two seeds. Only ratios within the run are asserted: how much of the way from
the start to a perfect judge a method has gone at the end, against `ddpo`, and network evaluations per picture. On three seeds of this
setting, after 256 pictures, `rlr_black_box` had a judge of 0.94 to 0.99 and TRL's DDPO at 5e-3 of 0.10 to 0.16 (benchmarks/results).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.analysis import Curve
from benchmarks.methods import METHODS
from benchmarks.one_run import run_ours
from benchmarks.tasks import TASKS

UPDATES, RATE, SEEDS = 16, 1e-2, (0, 1)
FASTER = {"rlr_black_box": 2.0, "rlr": 2.0}  # least progress over that of ddpo


def progress(curve: Curve) -> float:
    """Share of the way from the first judged score to 1 at the end; a method that lost ground has 0."""
    start, end = curve[0]["judge"], curve[-1]["judge"]
    return max(0.0, (end - start) / (1 - start))


def violations(curves: dict[str, list[Curve]]) -> list[str]:
    """What should hold between the methods' curves and does not."""
    gone = {method: statistics.fmean(map(progress, many)) for method, many in curves.items()}
    asked = {method: (many[0][-1]["forward"] + many[0][-1]["backward"]) / many[0][-1]["queries"] for method, many in curves.items()}
    found = [
        f"{method} went {gone[method]:.2f} of the way and ddpo {gone['ddpo']:.2f}: less than {factor:g} times as far"
        for method, factor in FASTER.items()
        if gone[method] < factor * gone["ddpo"] or gone[method] < 0.2
    ]
    if asked["rlr_black_box"] > 0.9 * asked["ddpo"]:
        found.append(
            f"rlr_black_box asks the network {asked['rlr_black_box']:.1f} times per picture and ddpo {asked['ddpo']:.1f} times"
        )
    return found


def compare(seeds: Sequence[int] = SEEDS) -> dict[str, list[Curve]]:
    """The curves of all methods and seeds."""
    runs = {
        method: [run_ours("digits", TASKS["digit"], METHODS[method], RATE, seed, UPDATES) for seed in seeds]
        for method in ("ddpo", *FASTER)
    }
    return {method: [costs.rows for costs in many] for method, many in runs.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    curves = compare()
    for method, many in curves.items():
        print(f"{method:16} judge " + ", ".join(f"{curve[-1]['judge']:.2f}" for curve in many))
    problems = violations(curves)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
