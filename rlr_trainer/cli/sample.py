"""`rlr-trainer sample`: pictures of a base or fine-tuned model, sampled as in training."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

# Options of the chain; the fine-tuned weights' own rlr_config.json gives the defaults.
SAMPLING = ("sample_num_steps", "sample_guidance_scale", "sample_eta", "negative_prompt", "height", "width")


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the subcommand."""
    sample = commands.add_parser(
        "sample",
        parents=[common],
        help="pictures of a base or fine-tuned model",
        description="Samples pictures as training does and writes 000.png, 001.png, ... and grid.png; with --reward also rewards.json. "
        "Picture i is that of RLRTrainer.generate for the same weights, prompts and seed.",
        allow_abbrev=False,
    )
    sample.add_argument("--model", required=True, help="digits, a pipeline's folder, or a hub id")
    sample.add_argument("--lora", default=None, help="LoRA weights: a run's folder, one of its checkpoints, or a hub id")
    sample.add_argument(
        "--prompts", required=True, nargs="+", help="prompts, or a file of them (.txt, .json, .jsonl, .csv, .parquet)"
    )
    sample.add_argument("--num_images", type=int, default=1, help="pictures of each prompt (default: 1)")
    sample.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    sample.add_argument("--output_dir", default="samples", help="folder for the pictures (default: samples)")
    sample.add_argument("--overwrite", action="store_true", help="allow a folder that holds such pictures")
    sample.add_argument("--reward", nargs="+", default=None, help="score the pictures: as the key reward of train")
    sample.add_argument("--batch_size", type=int, default=8, help="pictures at a time (default: 8)")
    sample.add_argument("--use_cpu", action="store_true", help="no GPU, even if there is one")
    chain = sample.add_argument_group(
        "sampling; by default as the weights were trained (their rlr_config.json), else as train does",
        argument_default=argparse.SUPPRESS,
    )
    chain.add_argument("--num_steps", dest="sample_num_steps", type=int, metavar="T", help="denoising steps")
    chain.add_argument(
        "--guidance_scale", dest="sample_guidance_scale", type=float, metavar="W", help="guidance weight; 1 or less switches it off"
    )
    chain.add_argument("--eta", dest="sample_eta", type=float, metavar="ETA", help="noise of DDIM, 0 to 1")
    chain.add_argument("--negative_prompt", help="negative prompt")
    chain.add_argument("--height", type=int, help="in pixels")
    chain.add_argument("--width", type=int, help="in pixels")
    sample.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    from rlr_trainer.observing.pictures import captions, picture_grid, write_pictures

    for name in ("num_images", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: must be at least 1")
    folder = Path(options.output_dir)
    old = [path for path in folder.glob("*.png") if path.stem.isdigit() or path.stem == "grid"] if folder.is_dir() else []
    if old and not options.overwrite:
        raise ValueError(
            f"--output_dir {folder}: holds {len(old)} pictures already; choose another folder, or allow it with --overwrite"
        )
    rows = _prompt_rows(options.prompts, options.num_images)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the work, so that none is done in vain
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot be made ({error.strerror})") from error
    trainer = _trainer(options)
    prompts = [row.prompt for row in rows]
    images = trainer.generate(
        [row.scale_prompts or row.prompt for row in rows], [row.negative_prompt for row in rows], seed=options.seed
    )
    result = None
    if options.reward is not None:
        metadata = tuple(row.metadata for row in rows)
        result = trainer.parts.evaluator.scorer.rate(images, tuple(prompts), metadata, "rlr-trainer sample")
    for path in old:
        path.unlink()
    files = write_pictures(images, folder)
    picture_grid(images, prompts if result is None else captions(prompts, result.total)).save(folder / "grid.png")
    print(f"written to {folder}: {files[0]} to {files[-1]}, grid.png")
    if result is not None:
        rewards, parts = _numbers(result.total), {name: _numbers(values) for name, values in result.parts.items()}
        record = {"seed": options.seed, "prompts": prompts, "files": files, "rewards": rewards, "parts": parts}
        (folder / "rewards.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        valid = [value for value in rewards if value is not None]
        mean = f"mean reward {sum(valid) / len(valid):.4g} of {len(valid)} pictures" if valid else "no picture has a reward"
        print(f"{mean}; all are in rewards.json")
    return 0


def _prompt_rows(sources: list[str], repeats: int) -> list[Any]:
    """One row per picture, those of a prompt one after the other."""
    from rlr_trainer.cli.settings import load_prompts
    from rlr_trainer.rollouts.prompts import DatasetPrompts

    rows = []
    for source in sources:
        dataset = load_prompts(source, "--prompts")
        if callable(dataset):
            raise ValueError(f"--prompts {source}: is a function; give prompts or a file of them")
        prompts = DatasetPrompts(dataset, 0, False, f"--prompts {source}")
        rows += [row for row in prompts.peek(len(prompts)) for _ in range(repeats)]
    return rows


def _trainer(options: argparse.Namespace) -> Any:
    """A trainer that trains nothing, for its `generate` and its rewards.

    The options of the chain are the command's, or those that the weights were trained with, or the usual ones.
    """
    from rlr_trainer.cli.settings import load_reward
    from rlr_trainer.training.config import RLRConfig
    from rlr_trainer.training.trainer import RLRTrainer

    records = (Path(folder) / "rlr_config.json" for folder in (options.lora, options.model) if folder is not None)
    record = next((path for path in records if path.is_file()), None)
    trained = {} if record is None else json.loads(record.read_text(encoding="utf-8"))
    settings = {name: trained[name] for name in (*SAMPLING, "prompt_scales") if name in trained}
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
    return RLRTrainer(config, _no_reward, lambda: ("", {}), _load_model(options.model, options.lora), eval_reward_function=rewards)


def _no_reward(images: Any, prompts: Any, metadata: Any) -> Any:
    return images.mean((1, 2, 3))


def _load_model(model: str, lora: str | None) -> Any:
    from rlr_trainer.cli.settings import load_model
    from rlr_trainer.pipelines import LORA_FILE, load_pipeline

    pipeline = load_model(model)
    pipeline = load_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    if lora is None:
        return pipeline
    folder = Path(lora)
    if folder.exists() and not (folder / LORA_FILE).is_file():
        raise ValueError(
            f"--lora {lora}: has no {LORA_FILE}; give a folder that save_model or a checkpoint wrote; a whole pipeline is a --model"
        )
    try:
        pipeline.load_lora_weights(lora, weight_name=LORA_FILE)
    except Exception as error:  # diffusers, safetensors, peft and the hub client raise kinds of their own
        missing = "" if folder.exists() else "no such folder, and as a hub id it "
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"--lora {lora}: {missing}cannot be loaded on --model {model} ({cause})") from error
    return pipeline


def _numbers(values: Any) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
