"""`rlr-trainer train`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    train = commands.add_parser(
        "train",
        parents=[common],
        help="train as a YAML file says",
        description="Trains as a YAML file says. Any key can be overridden: --learning_rate 1e-4 --fo_steps 3. The keys are model, "
        "reward, prompts, eval_prompts and every option of RLRConfig; an unknown key is an error.",
    )
    train.add_argument("--config", default=None, help="YAML file of keys and values")
    train.set_defaults(run=run, takes_overrides=True)


def run(options: argparse.Namespace) -> int:
    from rlr_trainer.run_config import build_trainer, load_settings

    settings = load_settings(options.config, options.overrides)
    trainer = build_trainer(settings)
    trainer.train()
    trainer.save_pretrained(trainer.args.output_dir)
    return 0
