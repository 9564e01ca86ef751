"""The main job on the bundled model: fine-tune it on a reward and judge the result. Run by `make demo` and `rlr-trainer demo`."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback

from rlr_trainer import digits
from rlr_trainer.cli.demo import DemoOptions
from rlr_trainer.digits.rewards import digit_reward, ink
from rlr_trainer.observing.progress import RewardProgress
from rlr_trainer.rewards import jpeg_compressibility
from rlr_trainer.training.config import RLRConfig
from rlr_trainer.training.trainer import RLRTrainer

EVALUATION_SAMPLES = 256
EVALUATION_SEED = 1_000_000  # far from the seeds that runs use
SAMPLE_STEPS = 10
BATCH_SIZE = 32


def demo_config(options: DemoOptions) -> RLRConfig:
    """The demo's settings; docs/demo.md records what was tried."""
    estimator = options.estimator or ("ddpo" if options.reward == "compressibility" else "rlr")
    return RLRConfig(
        output_dir=options.output_dir,
        overwrite=options.overwrite,
        estimator=estimator,
        max_steps=options.max_steps,
        seed=options.seed,
        sample_num_steps=SAMPLE_STEPS,
        sample_guidance_scale=1.0,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        lora_r=4,
        save_strategy="no",
        num_log_images=16,
        log_images_steps=10,
        use_cpu=True,
        disable_tqdm=options.quiet,
    )


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Trains, judges, and writes the run's files to `options.output_dir`.

    Returns:
        The content of `summary.json`. `judge_*` and `frechet_*` are None for rewards other than "digit".
    """
    started = time.perf_counter()
    reward = {"digit": lambda: digit_reward(options.target), "ink": lambda: ink, "compressibility": lambda: jpeg_compressibility}
    reward_function = reward[options.reward]()
    config = demo_config(options)
    trainer = RLRTrainer(config, reward_function, lambda: (digits.PROMPT, {}), digits.load_pipeline())
    trainer.check_output_folder()
    trainer.remove_callback(PrinterCallback if options.quiet else ProgressCallback)  # metrics.jsonl has what they print
    if not options.quiet:
        trainer.add_callback(RewardProgress)
    before = trainer.generate([digits.PROMPT] * EVALUATION_SAMPLES, seed=EVALUATION_SEED)
    trainer.train()
    after = trainer.generate([digits.PROMPT] * EVALUATION_SAMPLES, seed=EVALUATION_SEED)
    folder = Path(options.output_dir)
    trainer.save_pretrained(folder)
    summary: dict[str, Any] = {
        "reward": options.reward,
        "target": options.target if options.reward == "digit" else None,
        "estimator": config.estimator,
        "updates": trainer.state.global_step,
        "seed": options.seed,
    }
    for when, images in (("before", before), ("after", after)):
        summary |= {f"{name}_{when}": value for name, value in _judge(images, reward_function, options).items()}
    summary |= {
        "seconds": round(time.perf_counter() - started, 1),
        "reward_queries": trainer.rewards.queries,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_reward(trainer.state.log_history, summary, folder / "reward.png")
    plot_before_after(before, after, summary, folder / "before_after.png")
    return summary


def _judge(images: Tensor, reward_function: Callable[..., Tensor], options: DemoOptions) -> dict[str, float | None]:
    with torch.no_grad():
        value = float(reward_function(images, (digits.PROMPT,) * len(images), ({},) * len(images)).mean())
        if options.reward != "digit":
            return {"reward": value, "judge": None, "frechet": None}
        judge = digits.load_classifier("judge")(images).softmax(dim=-1)[:, options.target]
        return {
            "reward": round(value, 4),
            "judge": round(float(judge.mean()), 4),
            "frechet": round(digits.frechet_distance(images, options.target), 2),
        }


def _reward_label(summary: dict[str, Any]) -> str:
    if summary["reward"] == "digit":
        return f'classifier\'s probability of "{digits.DIGIT_NAMES[summary["target"]]}"'
    return {"ink": "mean brightness", "compressibility": "minus JPEG size [kB]"}[summary["reward"]]


def plot_reward(history: list[dict[str, Any]], summary: dict[str, Any], path: Path) -> None:
    """Mean reward of every rollout against updates and pictures scored, with the evaluation before and after."""
    from matplotlib.figure import Figure

    rows = [row for row in history if "reward" in row]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["reward"] for row in rows], color="#1f5fa8", label="training rollouts")
    ends = (0, summary["updates"])
    values = (summary["reward_before"], summary["reward_after"])
    axes.plot(ends, values, "o", color="#c23b22", label=f"{EVALUATION_SAMPLES} evaluation samples, fixed seeds")
    if summary["judge_before"] is not None:
        judged = (summary["judge_before"], summary["judge_after"])
        axes.plot(ends, judged, "D", mfc="none", ms=9, color="#2e7d32", label="the same, independent judge")
    axes.set_xlabel(f"update (batch {BATCH_SIZE})")
    axes.set_ylabel(_reward_label(summary))
    axes.set_title(f"{summary['estimator']}: {summary['reward_queries']} pictures scored in {summary['seconds']:.0f} s")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_before_after(before: Tensor, after: Tensor, summary: dict[str, Any], path: Path, count: int = 64) -> None:
    """Grids of the same seeds before and after, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    for axes, images, when in zip(figure.subplots(1, 2), (before, after), ("before", "after"), strict=True):
        rows = images[:count].unfold(0, 8, 8).permute(0, 4, 2, 3, 1)  # [8, 8, H, W, 3]
        grid = rows.permute(0, 2, 1, 3, 4).reshape(8 * images.shape[2], 8 * images.shape[3], 3)
        axes.imshow(grid.numpy())
        axes.set_axis_off()
        judge = summary[f"judge_{when}"]
        judged = "" if judge is None else f", judge {judge:.2f}, Frechet {summary[f'frechet_{when}']:.0f}"
        axes.set_title(f"{when}: reward {summary[f'reward_{when}']:.2f}{judged}", fontsize=11)
    figure.suptitle(f'"{digits.PROMPT}", the same {count} seeds; reward: {_reward_label(summary)}')
    figure.savefig(path, dpi=110)
