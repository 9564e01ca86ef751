"""`rlr-trainer train` and `diagnose`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

from rlr_trainer.cli.keys import SettingsError, keys_of_file
from rlr_trainer.cli.resolved import RunFile, keys_of
from rlr_trainer.cli.settings import RunArguments, build_trainer, help_on_keys, options_of_model, parse_run
from rlr_trainer.cli.summary import FirstUpdate, summary
from rlr_trainer.persistence.checkpoints import CheckpointStore
from rlr_trainer.persistence.output_folder import left_only_if_filled
from rlr_trainer.training.config import RLRConfig

logger = logging.getLogger(__name__)


def train(options: argparse.Namespace) -> None:
    """Trains; SIGTERM leaves by SystemExit(143)."""
    if options.help:
        print(f"{options.usage()}\n{help_on_keys()}")
        return
    if options.dry_run:
        from rlr_trainer.cli.estimate import estimate

        estimate(options)
        return
    if options.memory is not None:
        raise SettingsError(f"--memory {options.memory:g}: goes with --dry_run, which trains nothing; leave it out to train")
    run, config = parse_run(options.config, options.overrides)
    if isinstance(options.resume, str) and not Path(options.resume).is_dir():
        raise ValueError(f"--resume {options.resume}: no such folder; give that of a checkpoint, or nothing for the last one")
    with left_only_if_filled(Path(config.output_dir)):
        _train(run, config, options)


def _train(run: RunArguments, config: RLRConfig, options: argparse.Namespace) -> None:
    trainer = build_trainer(run, config)
    trainer.parts.arguments = dataclasses.asdict(run)
    given = keys_of(keys_of_file(options.config), options.overrides)
    of_model = options_of_model(run.model, given)
    trainer.add_callback(RunFile(run, {*given, *of_model}))
    config = trainer.args
    if trainer.eval_prompts is not None and config.eval_strategy == "no" and not config.eval_on_start:
        logger.warning("eval_prompts are given, but training evaluates nothing: set eval_strategy to steps, and eval_steps")
    if trainer.is_world_process_zero():
        print(summary(trainer, run.model, of_model, resumed=options.resume is not None), flush=True)
    trainer.add_callback(FirstUpdate())
    try:
        trainer.train(resume_from_checkpoint=options.resume)
    except KeyboardInterrupt as interrupt:
        saved = CheckpointStore(config.output_dir).checkpoints()
        way_on = f"--resume goes on from {saved[-1].name}" if saved else "no checkpoint was saved"
        raise KeyboardInterrupt(f"interrupted after {trainer.state.global_step} updates; {way_on}") from interrupt
    trainer.save_pretrained(config.output_dir)
    if trainer.is_world_process_zero():
        print(f"written to {config.output_dir}: the trained weights, README.md, run.yaml, metrics.jsonl")


def diagnose(options: argparse.Namespace) -> None:
    """Measures the estimators in a run."""
    run, config = parse_run(options.config, options.overrides)
    with left_only_if_filled(Path(config.output_dir)):
        trainer = build_trainer(run, config)
        diagnosis = trainer.diagnose(time_limit=options.time_limit, num_batches=options.num_batches)
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "diagnosis.json").write_text(diagnosis.to_json() + "\n")
    print(f"{diagnosis.table()}\n\nwritten to {folder}: diagnosis.json")
