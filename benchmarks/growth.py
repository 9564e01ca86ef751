"""How CPU seconds and peak memory of an update grow with T, batch, K and h, on the bundled digits model.

    OMP_NUM_THREADS=1 python benchmarks/growth.py    # about fifteen minutes of one core; writes benchmarks/results/growth.json

One quantity varies at a time; the others stay at T = 10, batch 4, K = 3, h = 1 (for h at T = 20, K = 1). Per point, a run of `RLRTrainer` with
LoRA of rank 16 and the ink reward. Seconds are CPU seconds of the process (one thread), the lesser of two updates after a first one; memory is
the peak above what was allocated before another update, with sampling, reward and stored chains.

Laws are lines a + b x by least squares of relative deviations, with standard errors, and the root mean square of those deviations. A line that
changes by less than 5 % of the mean over the range is called "constant"; else it is "linear" where they are below 10 %, or "neither".
"""

import argparse
import contextlib
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.memory import peak_bytes
from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.digits.rewards import ink

RESULTS = Path(__file__).parent / "results" / "growth.json"
UPDATES = 2
PLANS: dict[str, dict[str, Any]] = {
    "rlr": {"estimator": "rlr", "fo_steps": 3, "ho_length": 1},
    "ddpo": {"estimator": "ddpo"},
    "full_bp": {"estimator": "full_bp"},
}
MODES = ("recursive", "graph", "keep")
# Quantity -> (option, its values, plans, other options).
QUANTITIES: dict[str, tuple[str, tuple[int, ...], tuple[str, ...], dict[str, Any]]] = {
    "T": ("sample_num_steps", (5, 10, 20, 50), ("rlr", "full_bp"), {}),
    "batch": ("per_device_train_batch_size", (2, 4, 8, 16), ("rlr", "ddpo"), {}),
    "K": ("fo_steps", (1, 3, 6, 9), ("rlr",), {}),
    "h": ("ho_length", (1, 2, 4, 8), ("rlr",), {"sample_num_steps": 20, "fo_steps": 1}),
}
Point = dict[str, Any]


class Clock(TrainerCallback):
    """CPU seconds of every update, its rollout included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._before = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        self.seconds.append(now - self._before)
        self._before = now


def measure(pipeline: Any, options: dict[str, Any], updates: int = UPDATES) -> dict[str, Any]:
    """CPU seconds of `updates` updates after a first one, and the peak bytes of another."""
    base = {"sample_num_steps": 10, "per_device_train_batch_size": 4}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):  # Trainer's log lines
        config = RLRConfig(
            output_dir=folder, overwrite=True, sample_guidance_scale=1.0, num_log_images=0, check_reward=False, save_strategy="no",
            use_cpu=True, disable_tqdm=True, logging_strategy="no", **(base | options),
        )  # fmt: skip
        clock = Clock()
        trainer = RLRTrainer(config, ink, lambda: (digits.PROMPT, {}), copy.deepcopy(pipeline), callbacks=[clock])
        trainer.train(epochs=1 + updates)
        seconds = clock.seconds[1:]
        return {"seconds": seconds, "peak_bytes": peak_bytes(lambda: trainer.train(epochs=1), torch.device("cpu"))}


def line_of(x: list[float], y: list[float]) -> dict[str, float | str]:
    """The line y = a + b x of least relative deviations: a, b, their standard errors (n - 2 degrees of freedom), deviation, law."""
    (b, a), covariance = np.polyfit(x, y, 1, w=1 / np.array(y), cov=True)
    deviation = float(np.sqrt(np.mean((np.polyval([b, a], x) / y - 1) ** 2)))
    law = "linear" if deviation < 0.1 else "neither"
    if abs(b) * (max(x) - min(x)) < 0.05 * np.mean(y):
        law = "constant"
    b_error, a_error = np.sqrt(np.diag(covariance))
    errors = {"a_error": float(a_error), "b_error": float(b_error)}
    return {"a": float(a), "b": float(b), **errors, "deviation": deviation, "law": law}


def laws(points: list[Point]) -> list[dict[str, Any]]:
    """One fit of seconds and one of megabytes per quantity, plan and mode."""
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point["quantity"], point["plan"], point["recompute"]), []).append(point)
    fits = []
    for (quantity, plan, mode), own in groups.items():
        x = [float(point["value"]) for point in own]
        seconds = line_of(x, [min(point["seconds"]) for point in own])
        megabytes = line_of(x, [point["peak_bytes"] / 1e6 for point in own])
        fits.append({"quantity": quantity, "plan": plan, "recompute": mode, "seconds": seconds, "megabytes": megabytes})
    return fits


def table(fits: list[dict[str, Any]]) -> str:
    """The table of docs/memory_and_speed.md."""

    def cells(line: dict[str, Any]) -> str:
        a, b = (f"{line[name]:.3f} ± {line[name + '_error']:.3f}" for name in ("a", "b"))
        return f"{a} | {b} | {line['deviation']:.0%}"

    lines = ["| x | plan | recompute | CPU s: a | b | off by | MB: a | b | off by | memory is |", "|" + "---|" * 10]
    for fit in fits:
        start = f"| {fit['quantity']} | `{fit['plan']}` | {fit['recompute']} | "
        lines.append(start + cells(fit["seconds"]) + " | " + cells(fit["megabytes"]) + f" | {fit['megabytes']['law']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--quantities", nargs="+", choices=list(QUANTITIES), default=list(QUANTITIES), help="measure these alone again"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pipeline = digits.load_pipeline()
    work = [
        (quantity, plan, mode, value)
        for quantity in options.quantities
        for _, values, plans, _ in [QUANTITIES[quantity]]
        for plan in plans
        for mode in MODES
        for value in values
    ]
    old: list[Point] = json.loads(options.output.read_text())["points"] if options.output.exists() else []
    points = [point for point in old if point["quantity"] not in options.quantities]
    for quantity, plan, mode, value in tqdm(work, mininterval=30):
        option, _, _, others = QUANTITIES[quantity]
        found = measure(pipeline, {**PLANS[plan], **others, option: value, "recompute": mode})
        points.append({"quantity": quantity, "value": value, "plan": plan, "recompute": mode} | found)
    fits = laws(points)
    rows = (",\n".join(json.dumps(row) for row in rows) for rows in (fits, points))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text('{{"torch": "{}", "laws": [\n{}\n], "points": [\n{}\n]}}\n'.format(torch.__version__, *rows))
    print(table(fits))


if __name__ == "__main__":
    main()
