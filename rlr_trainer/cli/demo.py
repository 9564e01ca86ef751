"""`rlr-trainer demo`: fine-tunes a bundled model on a reward and judges the result."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import PrinterCallback, ProgressCallback

from rlr_trainer import digits
from rlr_trainer.cli.demo_subjects import Subject, make_subject
from rlr_trainer.observing.progress import RewardProgress
from rlr_trainer.persistence.model_card import write_model_card
from rlr_trainer.persistence.output_folder import free_folder, left_only_if_filled
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


def demo_config(**options: Any) -> RLRConfig:
    """The demo's settings, or in their place `options` of `RLRConfig`; docs/demo.md records what was tried."""
    own = {"per_device_train_batch_size": BATCH_SIZE, "save_strategy": "no", "num_log_images": 16, "log_images_steps": 10}
    return RLRConfig(**{**digits.OPTIONS, **own, "use_cpu": True, **options})


def demo(options: argparse.Namespace) -> None:
    """Trains, judges, and writes the run's files to `output_dir`."""
    with left_only_if_filled(Path(options.output_dir)):
        _demo(options)


def _demo(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    subject = make_subject(options)
    estimator = options.estimator or ("rlr_black_box" if options.reward == "compressibility" else "rlr")
    common = {name: getattr(options, name) for name in ("output_dir", "overwrite", "seed")} | subject.options
    common["max_steps"] = subject.updates if options.max_steps is None else options.max_steps
    own = {} if options.model == "digits" else FLOW_OPTIONS.get(estimator, {})
    config = demo_config(estimator=estimator, disable_tqdm=options.quiet, check_reward=False, **common, **own)
    trainer = RLRTrainer(config, subject.reward, lambda: (subject.prompt, {}), digits.load_pipeline(options.model))
    folder = free_folder(Path(options.output_dir), options.overwrite, trained_before=False, may_number=False)
    trainer.parts.collector.probe(trainer.parts.policy)  # in place of check_reward: a refusal should cost no pictures
    trainer.remove_callback(PrinterCallback if options.quiet else ProgressCallback)  # metrics.jsonl has what they print
    if not options.quiet:
        trainer.add_callback(RewardProgress(lines=False))
    prompts = [subject.prompt] * (EVALUATION_SAMPLES // subject.divisor)
    before = trainer.generate(prompts, seed=EVALUATION_SEED)
    trainer.train()
    after = trainer.generate(prompts, seed=EVALUATION_SEED)
    trainer.save_model(str(folder), _internal_call=True)
    numbers = {when: subject.measure(images) for when, images in (("before", before), ("after", after))}
    summary: dict[str, Any] = {
        "model": options.model,
        "reward": options.reward,
        "target": None,
        **subject.target,
        "estimator": estimator,
        "updates": trainer.state.global_step,
        "seed": options.seed,
        **{f"{name}_{when}": value for when, values in numbers.items() for name, value in values.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "reward_queries": trainer.rewards.queries,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    known = [name for name, value in numbers["before"].items() if value is not None]
    scores = {subject.labels[name]: (summary[f"{name}_before"], summary[f"{name}_after"]) for name in known}
    write_model_card(trainer, folder, scores=scores)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _plot_reward(
        trainer.state.log_history, summary, subject, len(prompts), config.per_device_train_batch_size, folder / "reward.png"
    )
    texts = [f"{when}\n" + ", ".join(f"{name} {values[name]:.4g}" for name in known) for when, values in numbers.items()]
    shown = subject.show({"before": before, "after": after}, texts, folder)
    print(f"\n{estimator}, {summary['updates']} updates, {summary['reward_queries']} samples scored")
    print(f"{'':24}{'before':>10}{'after':>10}")
    for label, (first, last) in scores.items():
        print(f"{label:24}{first:>10.3f}{last:>10.3f}")
    print(f"{summary['seconds']:.0f} s, peak memory {summary['peak_memory_mb']} MB")
    print(f"written to {folder}: summary.json, metrics.jsonl, reward.png, {', '.join(shown)}, LoRA weights")


def _plot_reward(
    history: list[dict[str, Any]], summary: dict[str, Any], subject: Subject, samples: int, batch_size: int, path: Path
) -> None:
    """Mean reward of every rollout against updates, with the evaluation before and after."""
    rows = [row for row in history if "reward" in row]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["reward"] for row in rows], label="training rollouts")
    markers = {"reward": "o", "judge": "D", "judge_direction": "s"}
    for name, marker in ((name, markers[name]) for name in subject.labels if name in markers):
        ends = summary[f"{name}_before"], summary[f"{name}_after"]
        if None not in ends:
            label = f"{subject.labels[name]}, {samples} evaluation samples, fixed seeds"
            axes.plot((0, summary["updates"]), ends, marker, mfc="none", label=label)
    title = f"{summary['estimator']}: {summary['reward_queries']} samples scored in {summary['seconds']:.0f} s"
    axes.set(xlabel=f"update (batch {batch_size})", ylabel=f"reward: {summary['reward']}", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
