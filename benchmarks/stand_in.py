"""A stand-in for the gradient of a black-box reward: tried against `rlr_black_box`; docs/estimators.md has what came of it.

    python benchmarks/stand_in.py --tasks ink compressibility detail --plans rlr_black_box tail --lr 1e-2 --seeds 0 1

A small convolutional network is fitted, between updates, to the pictures and rewards seen so far. A plan can use it in two ways:

- tail: noise and the likelihood ratio in the first 3 of 10 steps as in `rlr_black_box`, and first order through the last 7, or
  "tail, K=3" through the last 3, with the gradient of the network in place of the reward's. Biased as far as that gradient is wrong;
- control: `rlr_black_box` with a control variate whose value and gradient are the network's own, so unbiased whatever it says.

The value of the reward is always the black box's, and a picture is scored once; the network learns from a batch only after that
batch's gradients were taken. Every run is 15 updates of 32 samples, 10 steps, no guidance. Printed for each run: the mean reward of the
training rollouts of updates 1 to 5, 6 to 10 and so on, CPU seconds per update (start of the run and fitting included), and of the last
10 updates the correlation of the network's predictions with rewards that it had not yet seen.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.cli.demo import demo_config
from rlr_trainer.digits.rewards import digit_reward, ink
from rlr_trainer.rewards import jpeg_compressibility
from rlr_trainer.rollouts import collector

BLACK_BOX: dict[str, Any] = {"noise_steps": 3, "silent_estimator": "none", "advantage": "normalize", "adv_clip_max": 5.0}
PLANS: dict[str, dict[str, Any]] = {
    "rlr_black_box": {"estimator": "rlr_black_box"},
    "tail": {"estimator": "rlr", "fo_steps": 7, **BLACK_BOX},
    "tail, K=3": {"estimator": "rlr", "fo_steps": 3, **BLACK_BOX},
    "control": {"estimator": "rlr_black_box", "control_variate": True},
}
MEMORY = 512  # pairs
FIT_STEPS, FIT_BATCH, FIT_RATE = 8, 64, 3e-3


def detail(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """Fine detail: mean absolute Laplacian of the picture in 16 grey levels, [B]; its gradient is 0 almost everywhere."""
    levels = (images.detach().clamp(0, 1).mean(1, keepdim=True) * 15).round() / 15
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=images.device)
    return torch.nn.functional.conv2d(levels, kernel[None, None]).abs().mean((1, 2, 3))


TASKS = {"ink": ink, "compressibility": jpeg_compressibility, "detail": detail, "digit": digit_reward(7)}


class WithGradient(torch.autograd.Function):
    """Given values [B] with a given gradient [B, ...] with respect to the images."""

    @staticmethod
    def forward(ctx, images, values, gradient):
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx, outer):
        (gradient,) = ctx.saved_tensors
        return outer[:, None, None, None] * gradient, None, None


class StandIn:
    """A black-box reward with the gradient of a network that is fitted to it."""

    def __init__(self, reward: Any, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            conv = (nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.SiLU())
            self.network = nn.Sequential(*conv, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 1))
        self.reward, self.generator = reward, torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=FIT_RATE, weight_decay=1e-2)
        self.images, self.values, self.fitted = torch.zeros(0), torch.zeros(0), 0
        self.center, self.scale = torch.tensor(0.0), torch.tensor(1.0)
        self.correlations: list[float] = []
        self.fit_seconds = 0.0
        self.predicting = False

    def __call__(self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        if self.predicting:  # of the control variate: the network alone, no query
            return self.predict(images)
        self.fit()
        pictures = images.detach()
        with torch.no_grad():
            values = self.reward(pictures, prompts, metadata).float()
        with torch.enable_grad():
            own = pictures.clone().requires_grad_(True)
            guess = self.predict(own)
            (gradient,) = torch.autograd.grad(guess.sum(), own)
        if guess.detach().std() > 0 and values.std() > 0:
            self.correlations.append(float(torch.corrcoef(torch.stack([guess.detach(), values]))[0, 1]))
        self.images = torch.cat([self.images, pictures])[-MEMORY:] if len(self.images) else pictures
        self.values = torch.cat([self.values, values])[-MEMORY:]
        # no gradient while the predictions of new pictures are no better than a constant; not exactly 0, which a plan refuses
        return WithGradient.apply(images, values, gradient * max(self.trust(), 1e-6)) if images.requires_grad else values

    def trust(self) -> float:
        """1 once predictions of the last 3 batches, made before they were learnt, correlate with the rewards by more than 0.3."""
        return float(len(self.correlations) >= 3 and statistics.mean(self.correlations[-3:]) > 0.3)

    def predict(self, images: Tensor) -> Tensor:
        return self.network(images * 2 - 1)[:, 0] * self.scale + self.center

    def fit(self) -> None:
        """A few steps of least squares on standardized rewards of pairs drawn from the memory."""
        if not len(self.values):
            return
        started = time.process_time()
        self.center, self.scale = self.values.mean(), self.values.std().clamp_min(1e-12)  # of earlier batches alone, as the weights
        targets = (self.values - self.center) / self.scale
        with torch.enable_grad():
            for _ in range(FIT_STEPS):
                rows = torch.randint(len(targets), (FIT_BATCH,), generator=self.generator)
                loss = (self.network(self.images[rows] * 2 - 1)[:, 0] - targets[rows]).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
        self.fit_seconds += time.process_time() - started

    def predictions(self, original: Any) -> Any:
        """`collector.predict` with this network as its reward."""

        def predict(*args: Any, **kwargs: Any) -> Any:
            self.predicting = True
            try:
                return original(*args, **kwargs)
            finally:
                self.predicting = False

        return predict


def run(model: str, task: str, plan: str, lr: float, seed: int, updates: int) -> dict[str, Any]:
    stand_in = None if plan == "rlr_black_box" else StandIn(TASKS[task], seed)
    with tempfile.TemporaryDirectory() as folder:
        base = demo_config(estimator="rlr", max_steps=updates, output_dir=folder, seed=seed)
        own = base.rlr_options() | {"lr_scheduler_type": "constant", "per_device_train_batch_size": 32, "check_reward": False}
        own |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "num_log_images": 0}
        own |= {"report_to": "none", "output_dir": folder, "max_steps": updates, "seed": seed, "learning_rate": lr}
        config = RLRConfig(**(own | PLANS[plan]))
        trainer = RLRTrainer(config, stand_in or TASKS[task], lambda: (digits.PROMPT, {}), digits.load_pipeline(model))
        trainer.remove_callback(PrinterCallback)
        wrapped = stand_in.predictions(collector.predict) if stand_in else collector.predict
        started = time.process_time()
        with mock.patch.object(collector, "predict", wrapped):
            trainer.train()
        seconds = (time.process_time() - started) / updates
        curve = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    found = {"model": model, "task": task, "plan": plan, "lr": lr, "seed": seed, "curve": curve, "cpu": seconds}
    if stand_in:
        found |= {"correlations": stand_in.correlations, "fit_cpu": stand_in.fit_seconds / updates}
    return found


def line(row: dict[str, Any]) -> str:
    curve = " ".join(f"{statistics.mean(row['curve'][k - 5 : k]):.3f}" for k in range(5, len(row["curve"]) + 1, 5))
    seen = f"| {statistics.mean(row['correlations'][-10:]):.2f}, {row['fit_cpu']:.2f}" if "correlations" in row else "| -"
    return f"| {row['model']} | {row['task']} | {row['plan']} | {row['lr']:g} | {row['seed']} | {curve} | {row['cpu']:.2f} {seen} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/stand_in.jsonl"), help="one line of JSON a run is added to it")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--plans", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--model", default="digits", choices=list(digits.MODELS))
    parser.add_argument("--lr", type=float, nargs="*", default=[5e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--updates", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    print("| model | task | plan | lr | seed | reward of 5 updates | CPU s | correlation, CPU s of fitting |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        for task in options.tasks:
            for lr in options.lr:
                for plan in options.plans:
                    row = run(options.model, task, plan, lr, seed, options.updates)
                    with options.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(line(row), flush=True)


if __name__ == "__main__":
    main()
