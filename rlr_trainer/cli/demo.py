"""`rlr-trainer demo`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

REWARDS = ("digit", "ink", "compressibility")


def _option(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """Options of the demo.

    Raises:
        ValueError: a target, reward or number of updates that cannot be.
    """

    target: int = _option(7, "digit that the digit reward asks for, 0 to 9")
    reward: str = _option(
        "digit", "digit (a classifier's probability of the target), ink (mean brightness), or compressibility, which is a black box"
    )
    estimator: str | None = _option(None, "preset plan; default: rlr, or ddpo for the black box")
    max_steps: int = _option(40, "updates, of 32 samples each")
    output_dir: str = _option("runs/demo", "folder for the run's files")
    seed: int = _option(0, "seed of the run; those of the evaluation are fixed")
    overwrite: bool = _option(False, "allow an output_dir that holds another run")
    quiet: bool = _option(False, "no progress bars")

    def __post_init__(self) -> None:
        if self.target not in range(10):
            raise ValueError(f"target={self.target}: must be a digit from 0 to 9")
        if self.reward not in REWARDS:
            raise ValueError(f"reward={self.reward!r}: must be one of {', '.join(REWARDS)}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: must be at least 1")


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the subcommand."""
    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="fine-tune the bundled digits model",
        description="Fine-tunes the bundled digits model on a reward, in about a minute, and judges the result.",
        allow_abbrev=False,
    )
    for option in dataclasses.fields(DemoOptions):
        name, text = f"--{option.name}", option.metadata["help"]
        if isinstance(option.default, bool):
            demo.add_argument(name, action="store_true", help=text)
        else:
            shown = "" if option.default is None else " (default: %(default)s)"
            kind = int if isinstance(option.default, int) else str
            demo.add_argument(name, type=kind, default=option.default, help=text + shown)
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    from rlr_trainer.cli.digits_demo import run_demo

    summary = run_demo(DemoOptions(**{option.name: getattr(options, option.name) for option in dataclasses.fields(DemoOptions)}))
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
