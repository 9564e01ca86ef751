"""The run's own file: what the YAML file and the overrides came to together, written to the output folder as run.yaml."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from rlr_trainer import __version__
from rlr_trainer.cli.keys import flags_of
from rlr_trainer.persistence.provenance import SECRETS

FILE = "run.yaml"
# Written even where nobody gave them: what a training is made of stays as it was when a default changes.
ALWAYS = (
    "output_dir",
    "estimator",
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "sample_num_steps",
    "sample_guidance_scale",
)


def keys_of(file: Collection[str], overrides: Sequence[str]) -> set[str]:
    """The keys that a file and overrides give."""
    flags = {flag.replace("-", "_") for flag in flags_of(overrides)}
    return {*file, *flags, *(flag.removeprefix("no_") for flag in flags)}


def resolved(run: Any, config: Any, keys: Collection[str]) -> str:
    """The YAML text that `--config` reads to train the same again; secrets are left out.

    Args:
        run: a `RunArguments`.
        config: an `RLRConfig`.
        keys: what was given; everything else is at its default, and left out if it is not one of `ALWAYS`.
    """
    of_run = {name: value for name, value in dataclasses.asdict(run).items() if value is not None}
    fields = [field.name for field in dataclasses.fields(config) if field.init and field.name in {*keys, *ALWAYS}]
    options = {name: _plain(getattr(config, name)) for name in fields if SECRETS.isdisjoint(name.split("_"))}
    head = f"# What `rlr-trainer train` {__version__} trained with: the file and the overrides together. Paths are as they were given.\n"
    return head + yaml.safe_dump(of_run | options, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    value = value.value if isinstance(value, enum.Enum) else value
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


class RunFile(TrainerCallback):
    """Writes run.yaml when the training begins."""

    def __init__(self, run: Any, keys: Collection[str]) -> None:
        self.run, self.keys = run, keys

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / FILE).write_text(resolved(self.run, args, self.keys), encoding="utf-8")
