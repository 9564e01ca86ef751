"""`rlr-trainer sample`: pictures of a base or fine-tuned model, sampled as in training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rlr_trainer.cli.settings import load_model, load_prompts, load_reward, options_of_model
from rlr_trainer.digits.rewards import ink
from rlr_trainer.observing.clips import gif_bytes
from rlr_trainer.observing.pictures import captions, clip_grid, picture_grid, write_pictures
from rlr_trainer.persistence.output_folder import left_only_if_filled
from rlr_trainer.pipelines import adapt, load_pipeline
from rlr_trainer.pipelines.sources import check_source
from rlr_trainer.rollouts.prompts import DatasetPrompts, PromptRow
from rlr_trainer.training.config import RLRConfig
from rlr_trainer.training.trainer import RLRTrainer

# Options of the chain; the fine-tuned weights' own rlr_config.json gives the defaults.
SAMPLING = (
    "sample_num_steps",
    "sample_guidance_scale",
    "sample_guidance_rescale",
    "sampler",
    "sample_eta",
    "noise_steps",
    "noise_window",
    "noise_window_range",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
)


def sample(options: argparse.Namespace) -> None:
    """Samples, and writes the pictures and their rewards."""
    if options.num_images < 1:
        raise ValueError(f"--num_images {options.num_images}: must be at least 1")
    folder = Path(options.output_dir)
    old = [path for path in folder.glob("*") if path.suffix in (".png", ".gif") and (path.stem.isdigit() or path.stem == "grid")]
    if old and not options.overwrite:
        raise ValueError(f"--output_dir {folder}: holds {len(old)} pictures; choose another folder, or allow it with --overwrite")
    rows: list[PromptRow] = []
    for source in options.prompts:
        dataset = DatasetPrompts(load_prompts(source, "--prompts"), 0, False, f"--prompts {source}")
        rows += [row for row in dataset.peek(len(dataset)) for _ in range(options.num_images)]
    with left_only_if_filled(folder):
        folder.mkdir(parents=True, exist_ok=True)  # before the work, so that none is done in vain
        _sample_and_write(options, rows, folder, old)


def _sample_and_write(options: argparse.Namespace, rows: list[PromptRow], folder: Path, old: list[Path]) -> None:
    trainer = _trainer(options)
    prompts = [row.prompt for row in rows]
    negatives: Any = [row.negative_prompt for row in rows]
    metadata = tuple(row.metadata for row in rows)
    texts = [row.scale_prompts or row.prompt for row in rows]
    images = trainer.generate(texts, negatives, seed=options.seed, metadata=metadata)
    result = None
    if options.reward is not None:
        result = trainer.parts.evaluator.scorer.rate(images, tuple(prompts), metadata, "rlr-trainer sample")
    for path in old:
        path.unlink()
    files = write_pictures(images, folder)
    below = prompts if result is None else captions(prompts, result.total)
    picture_grid(images, below).save(folder / "grid.png")
    moving = clip_grid(images, below)
    if moving:
        (folder / "grid.gif").write_bytes(gif_bytes(moving))
    written = files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"
    print(f"written to {folder}: {written}, grid.png{' and grid.gif' if moving else ''}")
    if result is not None:
        rewards, parts = result.total.tolist(), {name: values.tolist() for name, values in result.parts.items()}
        record = json.dumps({"seed": options.seed, "prompts": prompts, "files": files, "rewards": rewards, "parts": parts})
        record = json.dumps(json.loads(record, parse_constant=lambda _: None), indent=1)  # JSON has no NaN: it becomes null
        (folder / "rewards.json").write_text(record + "\n", encoding="utf-8")
        count = len(rewards) - int(result.total.isnan().sum())
        word = "videos" if images.dim() == 5 else "pictures"
        print(
            f"mean reward {result.total.nanmean():.4f}, over {count} {word[:-1] if count == 1 else word}; all are in rewards.json"
        )


def _trainer(options: argparse.Namespace) -> RLRTrainer:
    """A trainer that trains nothing, for its `generate` and its rewards.

    The options of the chain are the command's, or those that the weights were trained with, or those that `train` takes for the model.
    """
    records = (Path(folder) / "rlr_config.json" for folder in (options.lora, options.model) if folder is not None)
    record = next((path for path in records if path.is_file()), None)
    trained = {} if record is None else json.loads(record.read_text(encoding="utf-8"))
    settings = {name: value for name, value in options_of_model(options.model, ()).items() if name in SAMPLING}
    settings |= {name: trained[name] for name in (*SAMPLING, "prompt_scales") if name in trained}
    settings |= {name: value for name, value in vars(options).items() if name in SAMPLING}
    config = RLRConfig(
        output_dir=options.output_dir,
        estimator="full_bp",  # nothing is estimated: the plan must only be one that fits any number of steps and any noise
        use_lora=False,
        num_log_images=0,
        per_device_train_batch_size=options.batch_size,
        reward_batch_size=options.batch_size,
        use_cpu=options.use_cpu,
        **settings,
    )
    rewards = None if options.reward is None else [load_reward(name) for name in options.reward]
    # ink stands in for the training's reward, which is never asked
    return RLRTrainer(config, ink, lambda: ("", {}), _load_model(options.model, options.lora), eval_reward_function=rewards)


def _load_model(model: str, lora: str | None) -> Any:
    pipeline = load_model(model)
    pipeline = load_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    if lora is None:
        return pipeline
    adapter = adapt(pipeline)
    check_source("--lora", lora, adapter.lora_file)
    try:
        adapter.add_lora(lora)
    except Exception as error:  # diffusers, safetensors, peft and the hub client raise kinds of their own
        rule = f"must be a folder with {adapter.lora_file}, as a run or a checkpoint writes it, or a hub id; a whole pipeline is a --model"
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"--lora {lora}: cannot be loaded on --model {model}; {rule} ({cause})") from error
    return pipeline
