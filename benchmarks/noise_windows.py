"""Whether the window that `noise_steps="auto"` chooses is the one that learns fastest.

    python benchmarks/noise_windows.py --model digits-flow --seeds 0 1

Measures the windows of a black-box digit reward as `auto_noise_steps` does, then trains with each: 30 updates of 32 samples, 10 steps, no
guidance, AdamW at 5e-3. Columns: the modelled merit over that of the best window; first of the evaluations after 5, 10, 15, ... updates
whose mean reward (128 samples) is at least 0.9, for every seed; CPU seconds of the training (evaluations too), mean.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import TrainerCallback

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.diagnosis import auto_noise_steps
from rlr_trainer.digits.rewards import digit_reward

TARGET = 7
UPDATES = 30


def reward(images, prompts, metadata):
    """A classifier's probability of the target, without a gradient."""
    return digit_reward(TARGET)(images.detach(), prompts, metadata)


def make_trainer(model: str, folder: str, seed: int, noise_steps: int | str, callbacks: list[Any]) -> RLRTrainer:
    config = RLRConfig(
        output_dir=folder, estimator="rlr_black_box", noise_steps=noise_steps, sample_num_steps=10, sample_guidance_scale=1.0,
        per_device_train_batch_size=32, learning_rate=5e-3, lr_scheduler_type="constant", lora_r=4, max_steps=UPDATES, seed=seed,
        use_cpu=True, save_strategy="no", logging_strategy="no", num_log_images=0, check_reward=False, disable_tqdm=True,
    )  # fmt: skip
    return RLRTrainer(config, reward, lambda: (digits.PROMPT, {}), digits.load_pipeline(model), callbacks=callbacks)


class Rewards(TrainerCallback):
    """Mean rewards of the evaluations."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 5 == 0:
            with torch.no_grad():
                self.values.append(float(reward(self.trainer.generate([digits.PROMPT] * 128, seed=99), (), ()).mean()))


def train(model: str, noise_steps: int, seed: int) -> tuple[int | None, float]:
    """Updates to 0.9 (None: not reached), and CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        rewards = Rewards()
        rewards.trainer = make_trainer(model, folder, seed, noise_steps, [rewards])
        started = time.process_time()
        rewards.trainer.train()
        reached = next((5 * (number + 1) for number, value in enumerate(rewards.values) if value >= 0.9), None)
        return reached, time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-flow", choices=list(digits.MODELS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--windows", type=int, nargs="*", help="lengths; default: all that add noise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        chosen, windows = auto_noise_steps(make_trainer(options.model, folder, options.seeds[0], "auto", []))
    best = max(window.merit for window in windows)
    print("| noise in the first | merit | updates to 0.9 | CPU s |\n|---|---|---|---|")
    for window in windows:
        if options.windows and window.noise_steps not in options.windows:
            continue
        runs = [train(options.model, window.noise_steps, seed) for seed in options.seeds]
        name = f"{window.noise_steps}{' (auto)' if window is chosen else ''}"
        reached = ", ".join("-" if updates is None else str(updates) for updates, _ in runs)
        print(
            f"| {name} | {window.merit / best:.2g} | {reached} | {statistics.mean(seconds for _, seconds in runs):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
