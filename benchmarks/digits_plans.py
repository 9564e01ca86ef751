"""Fine-tune a bundled digits model with many plans, and judge each on more than its reward.

    python benchmarks/digits_plans.py --output runs/plans.json --seeds 0 1 2            # all plans, more than an hour on one core
    python benchmarks/digits_plans.py --output runs/default.json --plans rlr --seeds 0 1 2 3 4
    python benchmarks/digits_plans.py --output runs/flow.json --model digits-flow --seeds 0 1 2 3 4 \\
        --plans "rlr, K=5, noise in 5 steps" rlr_black_box

Every run is 40 updates of 32 samples, 10 steps (DDIM with eta 1; digits-flow: Flow-CPS 0.8), no guidance, AdamW at 5e-3 unless the plan
says otherwise; the prompt is "a handwritten digit", the reward a classifier's probability of a seven. Columns of the table, mean over the seeds:

- updates to 0.9: first of the evaluations after 5, 10, 15, ... updates whose mean reward is at least 0.9;
- reward, judge, Frechet: on 256 samples with fixed seeds after the last update; judge is a classifier of another architecture that the
  training never sees, Frechet the distance to the real sevens in its features;
- diversity: mean distance between two samples in the judge's features;
- s/update: seconds of one update on this machine, one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.cli.demo import EVALUATION_SAMPLES, EVALUATION_SEED, demo_config
from rlr_trainer.digits.rewards import digit_reward

# steps without noise have no likelihood ratio: their share of the gradient is left out
UNSCORED = {"silent_estimator": "none"}
PLANS: dict[str, dict[str, Any]] = {
    "rlr": {"estimator": "rlr"},
    "rlr, K=1": {"estimator": "rlr", "fo_steps": 1},
    "rlr, K=2": {"estimator": "rlr", "fo_steps": 2},
    "rlr, K=5": {"estimator": "rlr", "fo_steps": 5},
    "rlr, h=2": {"estimator": "rlr", "ho_length": 2},
    "rlr, 3 of 7 rest steps": {"estimator": "rlr", "ho_length": 0, "rest_num_steps": 3},
    "rlr, control variate": {"estimator": "rlr", "control_variate": True},
    "rlr, K=1, control variate": {"estimator": "rlr", "fo_steps": 1, "control_variate": True},
    "rlr, lr 2e-3": {"estimator": "rlr", "learning_rate": 2e-3},
    "rlr, lr 1e-2": {"estimator": "rlr", "learning_rate": 1e-2},
    "rlr_paper (K=1, h=2, zo)": {"estimator": "rlr_paper"},
    "rlr_paper without zo": {"estimator": "rlr_paper", "rest_estimator": "none"},
    "draft (K=1)": {"estimator": "draft"},
    "draft, K=3": {"estimator": "draft", "fo_steps": 3},
    "full_bp": {"estimator": "full_bp"},
    "sqdf": {"estimator": "sqdf"},
    "ddpo": {"estimator": "ddpo"},
    "ddpo, silent steps left out": {"estimator": "ddpo", **UNSCORED},  # for samplers whose last step adds no noise
    "ddpo, noise in 3 steps": {"estimator": "ddpo", "noise_steps": 3, **UNSCORED},
    "rlr_black_box": {"estimator": "rlr_black_box"},
    "rlr_black_box, leave-one-out": {"estimator": "rlr_black_box", "advantage": "leave_one_out"},
    "rlr_black_box, lr 1e-2": {"estimator": "rlr_black_box", "learning_rate": 1e-2},
    "rlr, K=5, noise in 5 steps": {"estimator": "rlr", "fo_steps": 5, "noise_steps": 5},
    "flow_grpo": {"estimator": "flow_grpo"},
    "flow_grpo, lr 1e-2": {"estimator": "flow_grpo", "learning_rate": 1e-2},
    "mixgrpo": {"estimator": "mixgrpo"},
    "mixgrpo, lr 1e-2": {"estimator": "mixgrpo", "learning_rate": 1e-2},
    "mixgrpo, window moves every 4 rollouts": {"estimator": "mixgrpo", "noise_window_rollouts": 4},
    "rlr_black_box, random window": {"estimator": "rlr_black_box", "noise_window": "random"},
    "es": {"estimator": "es"},
    "awm": {"estimator": "awm"},
    "awm, lr 1e-2": {"estimator": "awm", "learning_rate": 1e-2},
    "awm, 4 times, lr 1e-2": {"estimator": "awm", "forward_times": 4, "learning_rate": 1e-2},
    "nft": {"estimator": "nft"},
    "nft, lr 1e-2": {"estimator": "nft", "learning_rate": 1e-2},
    "nft, 4 times, lr 1e-2": {"estimator": "nft", "forward_times": 4, "learning_rate": 1e-2},
}
TARGET = 7


class Curve(TrainerCallback):
    """Evaluates every `every` updates; its own time does not count as training time."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[dict[str, float]] = []
        self.evaluating = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            started = time.perf_counter()
            self.rows.append({"update": state.global_step} | evaluate(self.trainer))
            self.evaluating += time.perf_counter() - started


def evaluate(trainer: RLRTrainer) -> dict[str, float]:
    images = trainer.generate([digits.PROMPT] * EVALUATION_SAMPLES, seed=EVALUATION_SEED)
    judge = digits.load_classifier("judge")
    with torch.no_grad():
        features = judge.features(images)
        return {
            "reward": float(digits.load_classifier("reward")(images).softmax(-1)[:, TARGET].mean()),
            "judge": float(judge(images).softmax(-1)[:, TARGET].mean()),
            "frechet": digits.frechet_distance(images, TARGET),
            "diversity": float(torch.pdist(features).mean()),
        }


def run(model: str, options: dict[str, Any], seed: int, updates: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        base = demo_config(estimator="rlr", max_steps=updates, output_dir=folder, seed=seed)
        own = base.rlr_options() | {"learning_rate": base.learning_rate, "lr_scheduler_type": base.lr_scheduler_type}
        own |= {"per_device_train_batch_size": base.per_device_train_batch_size, "save_strategy": "no", "use_cpu": True}
        own |= {"output_dir": folder, "max_steps": updates, "seed": seed, "disable_tqdm": True, "logging_strategy": "no"}
        config = RLRConfig(**(own | options))
        curve = Curve(5)
        pipeline = digits.load_pipeline(model)
        trainer = RLRTrainer(config, digit_reward(TARGET), lambda: (digits.PROMPT, {}), pipeline, callbacks=[curve])
        curve.trainer = trainer
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started - curve.evaluating
        return {"seed": seed, "seconds_per_update": seconds / updates, "curve": curve.rows}


def summarize(name: str, runs: list[dict[str, Any]]) -> str:
    def mean(key: str) -> float:
        return statistics.mean(r["curve"][-1][key] for r in runs)

    reached = [next((row["update"] for row in r["curve"] if row["reward"] >= 0.9), None) for r in runs]
    updates = f"{statistics.mean(reached):.0f}" if all(reached) else f"{sum(x is not None for x in reached)} of {len(reached)} runs"
    lowest = min(r["curve"][-1]["judge"] for r in runs)
    return (
        f"| {name} | {updates} | {mean('reward'):.2f} | {mean('judge'):.2f} ({lowest:.2f}) | {mean('frechet'):.0f} | {mean('diversity'):.1f} | "
        f"{statistics.mean(r['seconds_per_update'] for r in runs):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/plans.json"))
    parser.add_argument(
        "--plans", nargs="*", default=list(PLANS), choices=list(PLANS), metavar="PLAN", help=f"of {', '.join(PLANS)}"
    )
    parser.add_argument("--model", default="digits", choices=list(digits.MODELS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    work = [(name, seed) for name in options.plans for seed in options.seeds]
    for name, seed in tqdm(work):
        results.setdefault(name, []).append(run(options.model, PLANS[name], seed, options.updates))
        options.output.write_text(json.dumps(results, indent=1))
    print("| plan | updates to 0.9 | reward | judge (worst seed) | Frechet | diversity | s/update |\n|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        print(summarize(name, runs))


if __name__ == "__main__":
    main()
