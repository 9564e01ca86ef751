"""The `rlr-trainer` command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

EXIT_USAGE = 2
EXIT_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 1 (the run failed) or 2 (wrong arguments)."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if options.debug:
            raise
        print(f"rlr-trainer {options.command}: {error}", file=sys.stderr)
        return EXIT_FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="rlr-trainer", description="Fine-tune diffusion models on a reward.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_train(commands, common)
    _add_diagnose(commands, common)
    _add_demo(commands, common)
    return parser


def _add_train(commands: Any, common: argparse.ArgumentParser) -> None:
    train = commands.add_parser(
        "train",
        parents=[common],
        help="train as a YAML file says",
        description="Trains as a YAML file says. Any key can be overridden: --learning_rate 1e-4 --fo_steps 3. The keys are model, "
        "reward, prompts, eval_prompts and every option of RLRConfig; an unknown key is an error.",
    )
    train.add_argument("--config", default=None, help="YAML file of keys and values")
    train.set_defaults(run=_run_train, takes_overrides=True)


def _run_train(options: argparse.Namespace) -> int:
    from rlr_trainer.run_config import build_trainer, load_settings

    settings = load_settings(options.config, options.overrides)
    trainer = build_trainer(settings)
    trainer.train()
    trainer.save_pretrained(trainer.args.output_dir)
    return 0


def _add_diagnose(commands: Any, common: argparse.ArgumentParser) -> None:
    diagnose = commands.add_parser(
        "diagnose",
        parents=[common],
        help="measure bias, noise, time and memory of gradient estimators on a run's model and reward",
        description="Measures what each estimator would do in the run that a YAML file and overrides describe (as for train), prints a "
        "table with a recommendation, and writes diagnosis.json and diagnosis.png. Nothing is trained.",
        allow_abbrev=False,
    )
    diagnose.add_argument("--config", default=None, help="YAML file of keys and values")
    diagnose.add_argument("--time_limit", type=float, default=300.0, help="seconds to measure for (default: 300)")
    diagnose.add_argument(
        "--num_batches", type=int, default=None, help="at most so many updates per plan (default: what the time allows)"
    )
    diagnose.add_argument("--output_dir", default=None, help="folder for the two files (default: the run's output_dir)")
    diagnose.set_defaults(run=_run_diagnose, takes_overrides=True)


def _run_diagnose(options: argparse.Namespace) -> int:
    from pathlib import Path

    from rlr_trainer.run_config import build_trainer, load_settings

    settings = load_settings(options.config, options.overrides)
    if options.output_dir is not None:
        settings["output_dir"] = options.output_dir
    trainer = build_trainer(settings)
    diagnosis = trainer.diagnose(time_limit=options.time_limit, num_batches=options.num_batches)
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "diagnosis.json").write_text(diagnosis.to_json() + "\n")
    diagnosis.plot(folder / "diagnosis.png")
    print(diagnosis.table())
    print(f"\nwritten to {folder}: diagnosis.json, diagnosis.png")
    return 0


def _add_demo(commands: Any, common: argparse.ArgumentParser) -> None:
    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="fine-tune the bundled digits model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--target", type=int, default=7, help="digit that the digit reward asks for, 0 to 9")
    demo.add_argument(
        "--reward",
        default="digit",
        choices=("digit", "compressibility", "ink"),
        help="digit and ink are differentiable, compressibility is a black box",
    )
    demo.add_argument("--estimator", default=None, help="preset plan; unset: rlr, or ddpo for the black box")
    demo.add_argument("--max_steps", type=int, default=40, help="updates, of 32 samples each")
    demo.add_argument("--output_dir", default="runs/demo", help="folder for the run's files")
    demo.add_argument("--seed", type=int, default=0, help="seed of the run")
    demo.add_argument("--overwrite", action="store_true", help="allow an output_dir that holds another run")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=_run_demo)


def _run_demo(options: argparse.Namespace) -> int:
    from rlr_trainer.demo import DemoOptions, run_demo

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


if __name__ == "__main__":
    sys.exit(main())
