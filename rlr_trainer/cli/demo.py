"""`rlr-trainer demo`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the subcommand."""
    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="fine-tune the bundled digits model",
        description="Fine-tunes the bundled digits model on a reward, in about a minute, and judges the result.",
        allow_abbrev=False,
    )
    demo.add_argument("--target", type=int, default=7, help="digit that the digit reward asks for, 0 to 9 (default: 7)")
    demo.add_argument(
        "--reward",
        default="digit",
        choices=("digit", "compressibility", "ink"),
        help="digit and ink are differentiable, compressibility is a black box (default: digit)",
    )
    demo.add_argument("--estimator", default=None, help="preset plan (default: rlr, or ddpo for the black box)")
    demo.add_argument("--max_steps", type=int, default=40, help="updates, of 32 samples each (default: 40)")
    demo.add_argument("--output_dir", default="runs/demo", help="folder for the run's files (default: runs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    demo.add_argument("--overwrite", action="store_true", help="allow an output_dir that holds another run")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    from rlr_trainer.cli.digits_demo import DemoOptions, run_demo

    fields = ("target", "reward", "estimator", "max_steps", "output_dir", "seed", "overwrite", "quiet")
    summary = run_demo(DemoOptions(**{name: getattr(options, name) for name in fields}))
    print(f"\n{summary['estimator']}, {summary['updates']} updates, {summary['reward_queries']} pictures scored")
    print(f"{'':24}{'before':>10}{'after':>10}")
    labels = {"reward": "mean reward", "judge": "independent judge", "frechet": "Frechet distance"}
    for key, label in labels.items():
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        if before is not None:
            print(f"{label:24}{before:>10.3f}{after:>10.3f}")
    print(f"{summary['seconds']:.0f} s, peak memory {summary['peak_memory_mb']} MB")
    print(f"written to {options.output_dir}: summary.json, metrics.jsonl, reward.png, before_after.png, LoRA weights")
    return 0
