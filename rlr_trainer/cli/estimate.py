"""`rlr-trainer estimate`, and `train --dry_run`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from rlr_trainer import digits
from rlr_trainer.cli.settings import RunArguments, build_trainer, load_reward, parse_run, raw_options
from rlr_trainer.cli.summary import about_model, about_updates, in_units
from rlr_trainer.diagnosis.estimate import SHARE, Estimate, Memory
from rlr_trainer.diagnosis.estimate import estimate as estimate_run
from rlr_trainer.pipelines.skeleton import load_skeleton
from rlr_trainer.training.config import RLRConfig


def estimate(options: argparse.Namespace) -> None:
    """Prints what an update of a run will take; trains nothing and leaves no file."""
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        trainer, model, given, notes = trainer_of_shapes(options.config, options.overrides, folder)
        found = estimate_run(trainer, memory_gb=options.memory, on_cpu=given["use_cpu"], half_precision=given["fp16"])
        print(told(trainer, model, dataclasses.replace(found, notes=notes + found.notes), options.memory))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, what a training would warn of is not said."""
    package = logging.getLogger("rlr_trainer")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def trainer_of_shapes(config: str | None, overrides: list[str], folder: str) -> tuple[Any, str, dict[str, bool], list[str]]:
    """The trainer of a run, on the CPU, without its model's weights; the model's name; what the run says of CPU and fp16; what is left out."""
    given = raw_options(config, overrides, ("use_cpu", "fp16", "bf16"))
    half = given["fp16"]
    replaced = {"use_cpu": "true", "fp16": "false", "bf16": str(half or given["bf16"]).lower(), "output_dir": folder}
    replaced |= {"report_to": "none", "push_to_hub": "false", "save_strategy": "no", "load_best_model_at_end": "false"}
    run, settings = parse_run(config, [*overrides, *(f"--{name}={value}" for name, value in replaced.items())])
    functions, notes = [], []
    for name in run.reward or ():
        try:
            functions.append(load_reward(name))
        except Exception as error:  # weights that are not here, a server that is not up: the rest can be estimated
            functions.append(_brightness)
            notes.append(f"reward {name}: it cannot be loaded here ({' '.join(str(error).split())[:100]})")
    model = digits.load_pipeline(run.model) if run.model in digits.MODELS else _skeleton(run, settings)
    return build_trainer(run, settings, model, functions), str(run.model), given, notes


def _skeleton(run: RunArguments, settings: RLRConfig) -> Any:
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    return load_skeleton(str(run.model), dtype, dtype if settings.use_lora else torch.float32)


def _brightness(images: Any, prompts: Any, metadata: Any) -> Any:
    return images.flatten(1).mean(1)


def told(trainer: Any, model: str, found: Estimate, memory_gb: float | None) -> str:
    """The estimate in words and numbers."""
    calls, samples = found.calls, found.samples
    decoder = {"forward": calls.decodings, "backward": calls.decoder_backward}
    operations = ", ".join(f"{name} {in_units(value, 'FLOP')}" for name, value in found.flops.items())
    per_update = {"without a graph": calls.plain, "with one": calls.graph, "backward": calls.backward}
    lines = [
        f"model    {about_model(trainer, model)}",
        f"plan     {trainer.parts.plan}",
        f"update   {about_updates(trainer)}",
        f"network  passes per update and process: {_counted(per_update, samples)}",
        f"decoder  passes per update and process: {_counted(decoder, samples)}",
        f"compute  {operations} per update",
        "",
        *_table(found.memory),
    ]
    if found.notes:
        lines += ["", *(f"not counted: {note}" for note in found.notes)]
    if memory_gb is not None:
        lines += ["", *_fit(found, memory_gb)]
    return "\n".join(lines)


def _counted(numbers: dict[str, float], samples: int) -> str:
    return ", ".join(f"{number * samples:,.0f} {name}" for name, number in numbers.items())


def _table(memory: Memory) -> list[str]:
    rows = {**memory.parts, f"at the peak: {memory.largest}": memory.phases[memory.largest], "peak of one process": memory.peak}
    width = max(map(len, rows)) + 2
    others = ", ".join(f"{name} {in_units(value, 'B')}" for name, value in memory.phases.items() if name != memory.largest)
    return [*(f"{name:{width}}{in_units(value, 'B'):>10}" for name, value in rows.items()), f"(other phases: {others})"]


def _fit(found: Estimate, memory_gb: float) -> list[str]:
    of = f"{SHARE:.0%} of {memory_gb:g} GB, the rest left for the context, workspaces and fragmentation"
    if found.proposal == {}:
        return [f"fits in {of}"]
    assert found.proposed is not None
    if found.proposal is None:
        return [
            f"does not fit in {of}, and nothing that was tried does: least is {in_units(found.proposed.peak, 'B')}. Take bf16, LoRA, a smaller "
            "picture or model, or several processes with FSDP"
        ]
    lines = [f"does not fit in {of}; with these settings it does ({in_units(found.proposed.peak, 'B')}):"]
    return lines + [f"{name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in found.proposal.items()]
