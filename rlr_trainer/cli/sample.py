"""`rlr-trainer sample`: pictures of a base or fine-tuned model, sampled as in training."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

# Option of the command -> option of RLRConfig; the fine-tuned weights' own rlr_config.json gives the defaults.
SAMPLING = {
    "num_steps": "sample_num_steps",
    "guidance_scale": "sample_guidance_scale",
    "eta": "sample_eta",
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
}


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
    sample.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    settings = sample.add_argument_group(
        "sampling; by default as the weights were trained (their rlr_config.json), else as train does"
    )
    settings.add_argument("--num_steps", type=int, default=None, help="denoising steps")
    settings.add_argument("--guidance_scale", type=float, default=None, help="guidance weight; 1 or less switches it off")
    settings.add_argument("--eta", type=float, default=None, help="noise of DDIM, 0 to 1")
    settings.add_argument("--negative_prompt", default=None, help="negative prompt")
    settings.add_argument("--height", type=int, default=None, help="in pixels")
    settings.add_argument("--width", type=int, default=None, help="in pixels")
    sample.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    import torch

    from rlr_trainer.cli.settings import load_reward
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
    device = _device(options.device)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the work, so that none is done in vain
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot be made ({error.strerror})") from error
    functions = None if options.reward is None else [load_reward(name) for name in options.reward]
    images = _sample(options, rows, device)
    prompts, rewards = [row.prompt for row in rows], torch.full((len(rows),), math.nan)
    record: dict[str, Any] = {}
    if functions is not None:
        rewards, record = _score(functions, images, rows, options.batch_size)
    for path in old:
        path.unlink()
    files = write_pictures(images, folder)
    texts = prompts if functions is None else captions(prompts, rewards)
    picture_grid(images, texts).save(folder / "grid.png")
    if functions is not None:
        record = {"seed": options.seed, "prompts": prompts, "files": files} | record
        (folder / "rewards.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        valid = rewards[~torch.isnan(rewards)]
        print(f"mean reward {valid.mean():.4g} of {len(valid)} pictures" if len(valid) else "no picture has a reward")
    print(f"written to {folder}: {files[0]} to {files[-1]}, grid.png" + (", rewards.json" if functions is not None else ""))
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


def _device(name: str | None) -> Any:
    """The device of that name; by default the GPU, if there is one.

    Raises:
        ValueError: there is none of that name.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch reports a missing device in both ways
        raise ValueError(f"--device {name}: there is no such device ({next(iter(str(error).splitlines()), '')})") from error


def _sample(options: argparse.Namespace, rows: list[Any], device: Any) -> Any:
    """Pictures [N, 3, H, W], in batches."""
    import torch

    from rlr_trainer.estimators.chain import sample_chain, seeded_generator
    from rlr_trainer.observing.progress import RolloutBar
    from rlr_trainer.pipelines import PipelineChain, Policy, adapt
    from rlr_trainer.rollouts.batches import EVALUATION, condition_rows

    adapter = adapt(_load_model(options.model, options.lora))
    config = _config(options)
    for module in (*adapter.frozen_modules, adapter.decoder, adapter.denoiser):
        module.to(device)
    policy = Policy(adapter.denoiser).eval()
    schedule, shape = (
        adapter.schedule(config.sample_num_steps, config.sample_eta),
        adapter.latent_shape(config.height, config.width),
    )
    starts = range(0, len(rows), options.batch_size)
    images = []
    with torch.no_grad(), RolloutBar(len(starts), schedule.num_steps, disable=False) as bar:
        for start in starts:
            part = rows[start : start + options.batch_size]
            chain = PipelineChain(adapter, policy, policy, schedule, condition_rows(adapter, config, part), shape, device)
            generators = [seeded_generator(options.seed, EVALUATION, start + i) for i in range(len(part))]
            images.append(adapter.decode(sample_chain(chain, len(part), generators, on_step=bar.step).sample).cpu())
    return torch.cat(images)


def _load_model(model: str, lora: str | None) -> Any:
    from rlr_trainer.cli.settings import load_model
    from rlr_trainer.pipelines import LORA_FILE, load_pipeline

    pipeline = load_model(model)
    pipeline = load_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    if lora is None:
        return pipeline
    folder = Path(lora)
    if folder.exists() and not (folder / LORA_FILE).is_file():
        whole = (folder / "model_index.json").is_file()
        way_out = (
            "it is a whole pipeline, so give it as --model" if whole else "give a folder that save_model or a checkpoint wrote"
        )
        raise ValueError(f"--lora {lora}: has no {LORA_FILE}; {way_out}")
    try:
        pipeline.load_lora_weights(lora, weight_name=LORA_FILE)
    except Exception as error:  # diffusers, safetensors, peft and the hub client raise kinds of their own
        missing = "" if folder.exists() else "no such folder, and as a hub id it "
        raise ValueError(
            f"--lora {lora}: {missing}cannot be loaded on --model {model} ({type(error).__name__}: {error})"
        ) from error
    return pipeline


def _config(options: argparse.Namespace) -> Any:
    """The options of the chain: the command's, or those that the weights were trained with, or the usual ones."""
    from rlr_trainer.training.config import RLRConfig

    trained: dict[str, Any] = {}
    for folder in (options.lora, options.model):
        path = Path(folder or "") / "rlr_config.json"
        if folder is not None and path.is_file():
            trained = json.loads(path.read_text(encoding="utf-8"))
            break
    settings = {name: trained[name] for name in (*SAMPLING.values(), "prompt_scales") if name in trained}
    settings |= {name: getattr(options, key) for key, name in SAMPLING.items() if getattr(options, key) is not None}
    # nothing is estimated: the plan must only be one that fits any number of steps and any noise
    return RLRConfig(output_dir=options.output_dir, estimator="full_bp", use_cpu=True, **settings)


def _score(functions: list[Any], images: Any, rows: list[Any], size: int) -> tuple[Any, dict[str, Any]]:
    """Rewards [N], and what the file says of them."""
    import torch

    from rlr_trainer.rewards.interface import Rewards

    rewards = Rewards(functions)
    totals, parts = [], []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        prompts, metadata = tuple(row.prompt for row in part), tuple(row.metadata for row in part)
        result = rewards(images[start : start + size], prompts, metadata, differentiable=False)
        totals.append(result.total)
        parts.append(torch.stack([result.parts[name] for name in rewards.names]))
    total = torch.cat(totals)
    each = dict(zip(rewards.names, torch.cat(parts, 1), strict=True))
    return total, {"rewards": _numbers(total), "parts": {name: _numbers(values) for name, values in each.items()}}


def _numbers(values: Any) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
