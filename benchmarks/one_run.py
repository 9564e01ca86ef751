"""One run of the benchmark: trains once, judges as it goes, writes one JSON file.

    python benchmarks/one_run.py --model digits --task digit --method rlr_black_box --learning_rate 5e-3 --seed 0 --output run.json

The driver, `benchmarks/driver.py`, starts these. A method of TRL's needs an environment with TRL 0.23.1 (`make .venv-trl023/.installed`).
Costs are of training alone: pictures scored, rows through the denoiser (forward and backward apart), CPU seconds of the process.
A backward pass through a network with LoRA costs about as much as a forward pass: no gradient of the frozen weights is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.clip_tasks import CLIP_TASKS
from benchmarks.methods import METHODS, Method
from benchmarks.tasks import TASKS, Task, measure
from rlr_trainer import digits
from rlr_trainer.digits import moving

STEPS, BATCH = 10, 16
EVALUATION_SEED = 1_000_000  # far from the seeds that runs use
EVERY, SAMPLES, LAST_SAMPLES = 128, 128, 256  # pictures trained on between two evaluations; pictures of an evaluation
EVERY_CLIPS = 256  # clips, which cost several pictures; their evaluations are of half the sizes


class Costs:
    """Counts what training costs, and draws its curve; what evaluation costs is left out."""

    def __init__(self, task: Task, generate: Callable[[int], Tensor] | None = None, frames: int | None = None) -> None:
        self.task, self.generate, self.frames = task, generate, frames
        self.clips = task.measure is not None
        self.judged = task.reward()
        self.queries = self.forward = self.backward = 0
        self.rows: list[dict[str, float]] = []
        self.paused = False
        self.started, self.evaluating = time.process_time(), 0.0

    def reward(self, with_metadata: bool) -> Callable[..., Any]:
        """The task's reward, counted; TRL's trainers expect a pair."""
        inner = self.task.reward(self.frames) if self.frames else self.task.reward()

        def reward(images, prompts, metadata):
            self.queries += len(images)
            values = inner(images, prompts, metadata)
            return (values, {}) if with_metadata else values

        return reward

    def watch(self, denoiser: torch.nn.Module) -> None:
        def passed(gradient: Tensor) -> None:
            self.backward += len(gradient)

        def hook(module, inputs, output):
            if self.paused:
                return
            output = output if isinstance(output, Tensor) else output[0]
            self.forward += len(output)
            if output.requires_grad:
                output.register_hook(passed)

        denoiser.register_forward_hook(hook)

    def start(self) -> None:
        self.started = time.process_time()

    def evaluate(self, update: int, samples: int) -> None:
        began = time.process_time()
        seconds = began - self.started - self.evaluating
        self.paused = True
        samples //= 1 + self.clips
        images = self.generate(samples)
        costs = {"update": update, "queries": self.queries, "forward": self.forward, "backward": self.backward}
        costs |= {"cpu_seconds": round(seconds, 2), "samples": samples}
        measured = (self.task.measure or measure)(images, self.task, self.judged)
        self.rows.append(costs | {name: round(value, 4) for name, value in measured.items()})
        self.paused = False
        self.evaluating += time.process_time() - began

    def after_update(self, update: int, updates: int, batch: int) -> None:
        if update * batch % (EVERY_CLIPS if self.clips else EVERY) == 0 or update == updates:
            self.evaluate(update, SAMPLES)
        if update == updates:
            self.evaluate(update, LAST_SAMPLES)


def run_ours(model: str, task: Task, method: Method, learning_rate: float, seed: int, updates: int, batch: int = BATCH) -> Costs:
    from transformers import PrinterCallback, TrainerCallback

    from rlr_trainer import RLRConfig, RLRTrainer

    costs = Costs(task, frames=method.frames)
    prompt, size = (moving.moving_prompt(), moving.SIZE) if costs.clips else (digits.PROMPT, {})

    class Curve(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            costs.evaluate(0, SAMPLES)

        def on_step_end(self, args, state, control, **kwargs):
            costs.after_update(state.global_step, updates, batch)

    with tempfile.TemporaryDirectory() as folder:
        config = RLRConfig(
            output_dir=folder,
            sample_num_steps=STEPS,
            sample_guidance_scale=1.0,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            lora_r=4,
            max_steps=updates,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            num_log_images=0,
            check_reward=False,
            use_cpu=True,
            disable_tqdm=True,
            **((method.flow_options if model != "digits" else {}) | method.options),
            **size,
        )
        pipeline = digits.load_pipeline(model)
        trainer = RLRTrainer(config, costs.reward(False), lambda: (prompt, {}), pipeline, callbacks=[Curve()])
        trainer.remove_callback(PrinterCallback)
        costs.generate = lambda samples: trainer.generate([prompt] * samples, seed=EVALUATION_SEED)
        costs.watch(trainer.adapter.denoiser)
        costs.start()
        trainer.train()
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(digits.MODELS), default="digits")
    parser.add_argument("--task", choices=[*TASKS, *CLIP_TASKS], default="digit")
    parser.add_argument("--method", choices=list(METHODS), required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures per update")
    parser.add_argument("--options", type=json.loads, default={}, help="further options of RLRConfig, as JSON")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    method, task = METHODS[options.method], (TASKS | CLIP_TASKS)[options.task]
    if (options.task in CLIP_TASKS) != (options.model == "moving-digits"):
        raise SystemExit(f"--task {options.task} --model {options.model}: {', '.join(CLIP_TASKS)} are the tasks of moving-digits")
    settings = (options.learning_rate, options.seed, options.updates, options.batch)
    with contextlib.redirect_stdout(io.StringIO()):
        if method.trl is None:
            own = dataclasses.replace(method, options=method.options | options.options)
            costs = run_ours(options.model, task, own, *settings)
        else:
            if options.model != "digits" or options.options:
                raise SystemExit(f"{options.method} runs on --model digits alone, without --options")
            from benchmarks.trl_run import run_trl

            costs = run_trl(method.trl, task, *settings)
    record: dict[str, Any] = {name: value for name, value in vars(options).items() if name != "output"}
    record |= {"steps": STEPS, "torch": torch.__version__, "machine": platform.machine(), "curve": costs.rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_suffix(".partial")
    rows = ",\n".join(json.dumps(row) for row in record.pop("curve"))
    partial.write_text(json.dumps(record)[:-1] + f', "curve": [\n{rows}\n]}}\n')
    partial.replace(options.output)  # an interrupted run leaves no file that looks whole


if __name__ == "__main__":
    main()
