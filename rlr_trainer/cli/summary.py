"""What a run is, in a few lines at its start, and how long it will take, once its first update is done."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from rlr_trainer.diagnosis.network_calls import network_calls, stored_latents
from rlr_trainer.diagnosis.shapes import weight_bytes
from rlr_trainer.observing.lines import duration
from rlr_trainer.training.running import updates_of
from rlr_trainer.training.saving import save_steps_of

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def in_units(number: float, unit: str) -> str:
    """Three digits with a prefix of powers of ten: 1.23 GB."""
    size, prefix = next(((size, prefix) for size, prefix in _UNITS if number >= size), (1.0, ""))
    return f"{float(f'{number / size:.3g}'):g} {prefix}{unit}"


def about_model(trainer: Any, name: str | None) -> str:
    """Name, as the run calls it, class and size of what is trained."""
    layout, kind = trainer.parts.layout, type(trainer.parts.adapter.pipeline).__name__
    frames = "" if layout.num_frames is None else f", {layout.num_frames} frames"
    return f"{f'{name} ({kind})' if name else kind}, {layout.width} x {layout.height} pixels{frames}"


def about_updates(trainer: Any) -> str:
    """Pictures and calls of the network per update, over all processes."""
    config, parts = trainer.args, trainer.parts
    samples = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    calls = network_calls(parts.plan, parts.schedule.stds, kl_coef=config.kl_coef, passes=config.num_inner_epochs)
    guided = ", each of two rows (guidance)" if parts.adapter.is_guided(config.sample_guidance_scale) else ""
    kind = ("picture" if parts.layout.num_frames is None else "video") + ("s" if samples != 1 else "")
    counts = (
        f"{(calls.plain + calls.graph) * samples:,.0f} forward and {calls.backward * samples:,.0f} backward passes of the network"
    )
    return f"{samples} {kind}, {counts}{guided}"


def summary(trainer: Any, model: str | None = None, of_model: Mapping[str, Any] | None = None, resumed: bool = False) -> str:
    """Model, options `of_model` that nobody gave, plan, update, trained weights, memory that is known beforehand, and files of a run."""
    config, parts = trainer.args, trainer.parts
    trained = list(parts.policy.trainable_parameters().values())
    frozen = weight_bytes(parts.policy, parts.adapter.decoder, *parts.adapter.frozen_modules)
    steps = config.max_steps if config.max_steps > 0 else None
    updates = f"max_steps: {steps}" if steps else f"num_train_epochs: {config.num_train_epochs:g}"
    kind = "LoRA weights" if parts.use_lora else "the whole network"
    chains = 4 * config.rollout_size * stored_latents(parts.plan) * math.prod(parts.layout.shape)  # float32
    chosen = ", ".join(f"{name}: {value:g}" for name, value in (of_model or {}).items())
    schedule = str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type))
    lines = {
        "model": about_model(trainer, model),
        **({"options": f"{chosen} (of this model, because the run gives no others)"} if chosen else {}),
        "plan": str(parts.plan),
        "update": f"{about_updates(trainer)}; {updates}",
        "trained": f"{sum(p.numel() for p in trained):,} parameters ({kind}), learning rate {config.learning_rate:g}, {schedule}",
        "memory": f"weights {in_units(frozen, 'B')}, gradient and optimizer about {in_units(3 * sum(p.nbytes for p in trained), 'B')}, stored "
        f"chains {in_units(chains, 'B')}; activations: --dry_run estimates them",
        "files": f"{config.output_dir}, checkpoints {when_saved(trainer, resumed)}",
    }
    return "\n".join(f"{name:8}{text}" for name, text in lines.items())


def when_saved(trainer: Any, resumed: bool = False) -> str:
    """How often a run saves a checkpoint."""
    config = trainer.args
    if config.save_strategy != "steps":
        return {"no": "none", "epoch": "every epoch", "best": "at every best metric"}[config.save_strategy]
    if resumed and not config.save_steps_chosen:
        return "as often as before"
    steps = config.save_steps if config.save_steps_chosen else save_steps_of(config, updates_of(config, trainer.parts.collector))
    return "after every update" if steps == 1 else f"every {steps:g} updates"


class FirstUpdate(TrainerCallback):
    """Says after the first update how long it took, how long all will take, and the peak memory so far."""

    def __init__(self) -> None:
        self._started: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._started is None:
            self._started, self._first = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says it after the first update, from the main process."""
        if self._started is None or state.global_step != self._first + 1 or not state.is_world_process_zero:
            return
        seconds, left = time.perf_counter() - self._started, state.max_steps - self._first
        print(
            f"time    first update {duration(seconds)}, the {left} of this run about {duration(seconds * left)}; {_peak(args.device)}",
            flush=True,
        )


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        return f"peak memory {in_units(torch.cuda.max_memory_allocated(device), 'B')} on {torch.cuda.get_device_name(device)}"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"peak memory of the process {in_units(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, 'B')}"
