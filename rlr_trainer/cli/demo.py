"""`rlr-trainer demo`: fine-tunes a bundled model on a reward and judges the result."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback

from rlr_trainer import digits
from rlr_trainer.digits.rewards import digit_reward, ink
from rlr_trainer.observing.pictures import picture_grid
from rlr_trainer.observing.progress import RewardProgress
from rlr_trainer.persistence.model_card import write_model_card
from rlr_trainer.persistence.output_folder import free_folder, left_only_if_filled
from rlr_trainer.rewards import jpeg_compressibility
from rlr_trainer.training.config import RLRConfig
from rlr_trainer.training.trainer import RLRTrainer

EVALUATION_SAMPLES = 256
EVALUATION_SEED = 1_000_000  # far from the seeds that runs use
BATCH_SIZE = 32
# What a preset needs on a model that samples with little noise at the end and none in the last step; docs/demo.md compares.
FLOW_OPTIONS: dict[str, dict[str, Any]] = {
    "rlr": {"fo_steps": 5, "noise_steps": 5},
    "ddpo": {"silent_estimator": "none"},
}
NUMBERS = {"reward": "mean reward", "judge": "independent judge", "frechet": "Frechet distance"}


def demo_config(**options: Any) -> RLRConfig:
    """The demo's settings, and `options` of `RLRConfig`; docs/demo.md records what was tried."""
    return RLRConfig(
        sample_num_steps=10,
        sample_guidance_scale=1.0,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=5e-3,
        lora_r=4,
        save_strategy="no",
        num_log_images=16,
        log_images_steps=10,
        use_cpu=True,
        **options,
    )


def demo(options: argparse.Namespace) -> None:
    """Trains, judges, and writes the run's files to `output_dir`."""
    with left_only_if_filled(Path(options.output_dir)):
        _demo(options)


def _demo(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    target = options.target if options.reward == "digit" else None
    reward = {"ink": ink, "compressibility": jpeg_compressibility}.get(options.reward) or digit_reward(options.target)
    estimator = options.estimator or ("rlr_black_box" if options.reward == "compressibility" else "rlr")
    common = {name: getattr(options, name) for name in ("output_dir", "overwrite", "max_steps", "seed")}
    own = FLOW_OPTIONS.get(estimator, {}) if options.model == "digits-flow" else {}
    config = demo_config(estimator=estimator, disable_tqdm=options.quiet, check_reward=False, **common, **own)
    trainer = RLRTrainer(config, reward, lambda: (digits.PROMPT, {}), digits.load_pipeline(options.model))
    folder = free_folder(Path(options.output_dir), options.overwrite, trained_before=False, may_number=False)
    trainer.parts.collector.probe(trainer.parts.policy)  # in place of check_reward: a refusal should cost no pictures
    trainer.remove_callback(PrinterCallback if options.quiet else ProgressCallback)  # metrics.jsonl has what they print
    if not options.quiet:
        trainer.add_callback(RewardProgress(lines=False))
    before = trainer.generate([digits.PROMPT] * EVALUATION_SAMPLES, seed=EVALUATION_SEED)
    trainer.train()
    after = trainer.generate([digits.PROMPT] * EVALUATION_SAMPLES, seed=EVALUATION_SEED)
    trainer.save_model(str(folder), _internal_call=True)
    summary: dict[str, Any] = {
        "model": options.model,
        "reward": options.reward,
        "target": target,
        "estimator": estimator,
        "updates": trainer.state.global_step,
        "seed": options.seed,
        **{f"{name}_before": value for name, value in _judge(before, reward, target).items()},
        **{f"{name}_after": value for name, value in _judge(after, reward, target).items()},
        "seconds": round(time.perf_counter() - started, 1),
        "reward_queries": trainer.rewards.queries,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    known = [name for name in NUMBERS if summary[f"{name}_before"] is not None]
    write_model_card(
        trainer, folder, scores={NUMBERS[name]: (summary[f"{name}_before"], summary[f"{name}_after"]) for name in known}
    )
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _plot_reward(trainer.state.log_history, summary, folder / "reward.png")
    _grid_before_after({"before": before, "after": after}, summary).save(folder / "before_after.png")
    print(f"\n{estimator}, {summary['updates']} updates, {summary['reward_queries']} pictures scored")
    print(f"{'':24}{'before':>10}{'after':>10}")
    for name in known:
        print(f"{NUMBERS[name]:24}{summary[f'{name}_before']:>10.3f}{summary[f'{name}_after']:>10.3f}")
    print(f"{summary['seconds']:.0f} s, peak memory {summary['peak_memory_mb']} MB")
    print(f"written to {folder}: summary.json, metrics.jsonl, reward.png, before_after.png, LoRA weights")


@torch.no_grad()
def _judge(images: Tensor, reward: Callable[..., Tensor], target: int | None) -> dict[str, float | None]:
    """The numbers of `NUMBERS`; None but the reward if no digit is asked for."""
    value = round(float(reward(images, (digits.PROMPT,) * len(images), ({},) * len(images)).mean()), 4)
    if target is None:
        return {"reward": value, "judge": None, "frechet": None}
    judge = float(digits.load_classifier("judge")(images).softmax(dim=-1)[:, target].mean())
    return {"reward": value, "judge": round(judge, 4), "frechet": round(digits.frechet_distance(images, target), 2)}


def _plot_reward(history: list[dict[str, Any]], summary: dict[str, Any], path: Path) -> None:
    """Mean reward of every rollout against updates, with the evaluation before and after."""
    rows = [row for row in history if "reward" in row]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["reward"] for row in rows], label="training rollouts")
    for name, marker in (("reward", "o"), ("judge", "D")):
        ends = summary[f"{name}_before"], summary[f"{name}_after"]
        if None not in ends:
            label = f"{NUMBERS[name]}, {EVALUATION_SAMPLES} evaluation samples, fixed seeds"
            axes.plot((0, summary["updates"]), ends, marker, mfc="none", label=label)
    title = f"{summary['estimator']}: {summary['reward_queries']} pictures scored in {summary['seconds']:.0f} s"
    axes.set(xlabel=f"update (batch {BATCH_SIZE})", ylabel=f"reward: {summary['reward']}", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _grid_before_after(pictures: dict[str, Tensor], summary: dict[str, Any]) -> Any:
    """Grids of the same 64 seeds before and after, side by side."""
    grids = [images[:64].unflatten(0, (8, 8)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2) for images in pictures.values()]
    known = [name for name in NUMBERS if summary[f"{name}_before"] is not None]
    texts = [f"{when}\n" + ", ".join(f"{name} {summary[f'{name}_{when}']:.4g}" for name in known) for when in pictures]
    return picture_grid(torch.stack(grids), texts)
