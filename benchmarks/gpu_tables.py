"""Seconds and peak memory of an update of networks as large as Stable Diffusion 1.5, SDXL and Flux.1, with random weights.

    python benchmarks/gpu_tables.py                # on CUDA, at most ten minutes on one H200: three tables, runs/gpu_tables.json
    python benchmarks/gpu_tables.py --size tiny    # the same code on the CPU, with tiny networks

Nothing is downloaded. Every row is a run of `RLRTrainer` with LoRA of rank 16, in bfloat16 (float32 on the CPU), without classifier-free
guidance; the reward is the mean brightness of the decoded pictures, one picture at a time. Flux runs with gradient checkpointing, but not
with recompute="keep", which refuses it. One update is measured, sampling, reward and optimizer step included. On CUDA the smallest T has
one update before it that does not count, on which kernels are chosen. AdamW's moments are there from the start. Columns:

- s: seconds of the update; on the CPU with torch's memory profiler at work;
- peak, GB: highest sum of allocated tensors during the update, weights included (on CUDA torch.cuda.max_memory_allocated);
- held, GB: what of that was there before the update, weights and moments; on the CPU counted, not measured;
- sweep, GB: peak of the backward sweep above what was allocated at its start: the activations. Stored chains (and graphs that
  recompute="keep" holds) are there at its start, so they are not in it;
- chains, GB: stored latents, noises and means of the sweep's rollout, which grow with T.

A row whose memory does not suffice says so, and the script goes on. A table gets `--time_limit` seconds; a row that is expected to take
more than is left (T times the seconds per step of the same plan with fewer steps) is skipped, and says so.
"""

import argparse
import contextlib
import gc
import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from memory import allocations, peak_bytes, profiled_events
from random_pipelines import FULL, TINY, Size, make_pipeline
from transformers import TrainerCallback

from rlr_trainer import RLRConfig, RLRTrainer
from rlr_trainer.training.config import CHOICES

STEPS = (10, 50)
SWEEP = "backward sweep"  # its name in profiles
RECOMPUTE = tuple(mode for mode in ("recursive", "keep") if mode in CHOICES["recompute"])
# Flux's sampler and SDXL's add no noise in the last step, which has no likelihood ratio then
PLANS: dict[str, dict[str, Any]] = {
    "rlr": {},
    "ddpo": {"silent_estimator": "none"},
    "rlr_black_box": {},
    "draft": {},
}


def brightness(images, prompts, metadata):
    """Mean of every picture, [B]."""
    return images.mean((1, 2, 3))


class Meter(TrainerCallback):
    """Takes down the last update of a trainer: its seconds, the bytes of its sweep's stored chains, and on CUDA its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.held, self.peak, self.sweep, self.chains = 0.0, 0, 0, 0, 0

    def watch(self, updater: Any) -> None:
        """Measures the sweeps of an updater."""
        accumulate = updater.accumulate

        def measured(model, batch, *arguments, **keywords):
            results: list[Any] = []
            rollout = batch.rollout
            self.chains = sum(t.nbytes for part in (rollout.latents, rollout.noises, rollout.means) for t in part)
            with torch.profiler.record_function(SWEEP):
                if self.device.type == "cpu":
                    return accumulate(model, batch, *arguments, **keywords)
                self._look()
                self.sweep = peak_bytes(lambda: results.append(accumulate(model, batch, *arguments, **keywords)), self.device)
                self._look()
                return results[0]

        updater.accumulate = measured

    def on_step_begin(self, args, state, control, **kwargs):
        self.peak = 0
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._look()
        self.seconds = time.perf_counter() - self._started

    def _look(self) -> None:
        if self.device.type == "cuda":  # peak_bytes forgets the peak before it
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())


def profiled_peaks(run: Callable[[], Any]) -> tuple[int, int]:
    """As `memory.peak_bytes` on the CPU, of a run that has one sweep in it: (peak above its start, peak of the sweep above the sweep's)."""
    events = profiled_events(run)
    (sweep,) = (event for event in events if event.name() == SWEEP)
    first, last = sweep.start_ns(), sweep.start_ns() + sweep.duration_ns()
    live = peak = at_start = peak_of_sweep = 0
    for event in allocations(events):
        live += event.nbytes()
        peak = max(peak, live)
        if event.start_ns() < first:
            at_start = live
        elif event.start_ns() <= last:
            peak_of_sweep = max(peak_of_sweep, live)
    return peak, peak_of_sweep - at_start


@contextlib.contextmanager
def trainer_of(pipeline: Any, size: Size, device: torch.device, row: dict[str, Any]) -> Iterator[RLRTrainer]:
    """A trainer on a pipeline, which gets its network back without LoRA weights afterwards."""
    denoiser = pipeline.transformer if "flux" in row["model"] else pipeline.unet
    checkpointing = row["model"] == "flux" and row["recompute"] != "keep"
    with tempfile.TemporaryDirectory() as folder:
        config = RLRConfig(
            output_dir=folder, overwrite=True, estimator=row["plan"], recompute=row["recompute"], sample_num_steps=row["T"],
            sample_guidance_scale=3.5 if row["model"] == "flux" else 1.0, height=size.pixels, width=size.pixels,
            per_device_train_batch_size=size.batch, reward_batch_size=1, lora_r=16, learning_rate=1e-6,
            gradient_checkpointing=checkpointing, bf16=device.type == "cuda", use_cpu=device.type == "cpu", save_strategy="no",
            num_log_images=0, check_reward=False, disable_tqdm=True, logging_strategy="no", **PLANS[row["plan"]],
        )  # fmt: skip
        try:
            trainer = RLRTrainer(config, brightness, lambda: ("a picture", {}), pipeline)
            if row["model"] == "flux":
                trainer.parts.adapter.max_sequence_length = size.tokens
            yield trainer
        finally:
            denoiser.unload_lora()
            denoiser.disable_gradient_checkpointing()


def make_moments(trainer: RLRTrainer) -> int:
    """A step of AdamW at gradient 0, which makes its moments; returns the bytes of frozen and trained weights and of the moments."""
    trained = list(trainer.parts.policy.trainable_parameters().values())
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    modules = [m for m in trainer.parts.adapter.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    return sum(p.nbytes for module in modules for p in module.parameters()) + 2 * sum(p.nbytes for p in trained)


def measure(pipeline: Any, size: Size, device: torch.device, row: dict[str, Any], warm_up: bool) -> dict[str, float]:
    """Seconds and bytes of one update."""
    with trainer_of(pipeline, size, device, row) as trainer, contextlib.redirect_stdout(None):  # Trainer's log lines
        meter = Meter(device)
        meter.watch(trainer.parts.updater)
        trainer.add_callback(meter)
        held = make_moments(trainer)
        if device.type == "cuda":
            for _ in range(1 + warm_up):
                trainer.train(epochs=1)
            held, peak, sweep = meter.held, meter.peak, meter.sweep
        else:
            above, sweep = profiled_peaks(lambda: trainer.train(epochs=1))
            peak = held + above
    found = {"held_bytes": held, "peak_bytes": peak, "sweep_bytes": sweep, "chain_bytes": meter.chains}
    return found | {"seconds": meter.seconds}


def run_row(pipeline: Any, size: Size, device: torch.device, row: dict[str, Any]) -> dict[str, Any]:
    """The row with what was measured, or with `failed`."""
    try:
        return row | measure(pipeline, size, device, row, warm_up=row["T"] == STEPS[0])
    except torch.OutOfMemoryError:
        return row | {"failed": "out of memory"}
    except Exception as error:  # the rows that follow are worth having: machine time is short; the script's exit code tells
        logging.exception("%s", row)
        return row | {"failed": f"{type(error).__name__}: {error}"}


def run_table(model: str, size: Size, device: torch.device, time_limit: float, save: Any) -> list[dict[str, Any]]:
    """The rows of one model, those with fewer steps first."""
    started = time.perf_counter()
    pipeline = make_pipeline(model, size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    rows: list[dict[str, Any]] = []
    for steps in STEPS:
        for recompute in RECOMPUTE:
            for plan in PLANS:
                row = {"model": model, "plan": plan, "recompute": recompute, "T": steps}
                left = time_limit - (time.perf_counter() - started)
                expected = _expected_seconds(rows, row)
                if left < expected:
                    row["failed"] = f"skipped: {left:.0f} s left, {expected:.0f} s expected"
                else:
                    row = run_row(pipeline, size, device, row)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                rows.append(row)
                save(rows)
                print(line(row), flush=True)
    return rows


def _expected_seconds(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """By the same plan with fewer steps; 0 where there is none, so the first rows of a table can overrun the limit."""
    same = [r for r in rows if (r["plan"], r["recompute"]) == (row["plan"], row["recompute"])]
    return max((r["seconds"] * row["T"] / r["T"] for r in same if "seconds" in r), default=0.0)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"| `{row['plan']}` | {row['recompute']} | {row['T']} | "
    if "failed" in row:
        return start + f"{row['failed']} | | | | |"
    sizes = (f"{row[name] / 1e9:.4g}" for name in ("peak_bytes", "held_bytes", "sweep_bytes", "chain_bytes"))
    return start + f"{row['seconds']:.2f} | " + " | ".join(sizes) + " |"


def machine(device: torch.device) -> str:
    """Name of the device, and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.processor() or platform.machine()})"
    return f"{name}, torch {torch.__version__}"


def print_tables(tables: dict[str, list[dict[str, Any]]], sizes: dict[str, Size], device: torch.device) -> None:
    print(f"\n{machine(device)}")
    for model, rows in tables.items():
        size = sizes[model]
        print(f"\n{model}: {size.pixels} x {size.pixels} pixels, {size.batch} samples per update\n")
        print("| plan | recompute | T | s | peak, GB | held, GB | sweep, GB | chains, GB |\n|---|---|---|---|---|---|---|---|")
        print("\n".join(map(line, rows)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="full", choices=("full", "tiny"))
    parser.add_argument("--device", help="by default cuda for full, cpu for tiny")
    parser.add_argument("--models", nargs="*", default=list(FULL), choices=list(FULL))
    parser.add_argument("--time_limit", type=float, default=180.0, help="seconds per table")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_tables.json"))
    options = parser.parse_args(arguments)
    device, sizes = (
        torch.device(options.device or ("cuda" if options.size == "full" else "cpu")),
        FULL if options.size == "full" else TINY,
    )
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {}

    def save(model: str, rows: list[dict[str, Any]]) -> None:
        tables[model] = rows
        facts = {"machine": machine(device), "size": options.size, "time_limit": options.time_limit, "tables": tables}
        options.output.write_text(json.dumps(facts, indent=1))

    for model in options.models:
        run_table(model, sizes[model], device, options.time_limit, lambda rows, model=model: save(model, rows))
    print_tables(tables, sizes, device)
    known = ("out of memory", "skipped")
    return int(any(not row.get("failed", known[0]).startswith(known) for rows in tables.values() for row in rows))


if __name__ == "__main__":
    logging.getLogger("rlr_trainer").setLevel(logging.ERROR)  # biases of plans are no news here
    sys.exit(main())
