"""The README.md beside trained weights."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

CLIPS_FILE = "clips.gif"
_USE = """```python
from diffusers import {imports}{pipeline}{import_export}

pipe = {pipeline}.from_pretrained({source}){scheduler}{load}
{made} = pipe("a prompt", num_inference_steps={steps}, {guidance_argument}={guidance}{eta}{frames}).{output}[0]{export}
```"""
_IMPORT = "\nfrom diffusers.utils import export_to_gif"
_EXPORT = '\nexport_to_gif(frames, "video.gif")'
_DDIM = "\npipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{clip})  # what it was trained with"

_BODY = """
# {title}

{base_sentence} fine-tuned on a reward with [rlr_trainer](https://pypi.org/project/rlr-trainer/), estimator `{estimator}`.

## Use

{use}
{clips}
## Training

{updates} updates, {queries} pictures scored by {rewards}.{last}

| option | value |
|---|---|
{options}

Versions: torch {torch}, diffusers {diffusers}, transformers {transformers}.

## Method

Recursive Likelihood Ratio optimizer, "{paper}", [arXiv:{arxiv}](https://arxiv.org/abs/{arxiv}).
"""


def write_model_card(
    trainer: Any, folder: Path, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
) -> None:
    """Writes `folder/README.md` for the weights of `trainer`, from the main process."""
    if not trainer.is_world_process_zero():
        return
    args, num_frames = trainer.args, trainer.parts.layout.num_frames
    base = trainer.policy.config.name_or_path
    name = model_name or folder.resolve().name
    repository = trainer.hub_model_id or name
    scheduler = trainer.adapter.pipeline.scheduler
    clip = "" if "clip_sample" in scheduler.config else ", clip_sample=False"  # DDIM's default is True
    samplers = {"DDIMScheduler": "ddim", "PNDMScheduler": "ddim"}  # by the pipeline's scheduler, under sampler="auto"
    own = samplers.get(type(scheduler).__name__)
    is_ddim = (own if args.sampler == "auto" else args.sampler) == "ddim"
    use = _USE.format(
        pipeline=type(trainer.adapter.pipeline).__name__,
        source=_quoted((base or "the base pipeline") if trainer.use_lora else repository),
        load="\n" + trainer.adapter.lora_snippet(_quoted(repository)) if trainer.use_lora else "",
        steps=args.sample_num_steps,
        imports="DDIMScheduler, " if is_ddim else "",
        scheduler=_DDIM.format(clip=clip) if is_ddim else "",
        guidance_argument=trainer.adapter.guidance_argument,
        guidance=args.sample_guidance_scale,
        eta=f", eta={1.0 if args.sample_eta is None else args.sample_eta}" if is_ddim and args.noise_steps is None else "",
        **_output_of(num_frames),
    )
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    options = args.rlr_options() | {"learning_rate": args.learning_rate, "max_grad_norm": args.max_grad_norm, "seed": args.seed}
    body = _BODY.format(
        title=_plain_text(name),
        base_sentence=_code(base) if base else "A diffusion pipeline",
        estimator=args.estimator,
        use=use,
        clips="" if num_frames is None else _copy_clips(Path(args.output_dir) / "samples", folder, trainer.state.global_step),
        updates=trainer.state.global_step,
        queries=trainer.rewards.queries * trainer.accelerator.num_processes,
        rewards=", ".join(map(_code, trainer.rewards.names)),
        last=f" Mean reward of the first rollout {rewards[0]:.4g}, of the last {rewards[-1]:.4g}." if rewards else "",
        options="\n".join(f"| `{option}` | {_code(value)} |" for option, value in options.items() if value is not None),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
        paper=trainer._paper["title"],
        arxiv=trainer._paper["id"],
    )
    own_tags = [tags] if isinstance(tags, str) else list(tags or [])
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if num_frames is None else "text-to-video",
        base_model=base if base and not Path(base).exists() else None,
        datasets=[dataset_name] if dataset_name else None,
        tags=sorted({*trainer._tag_names, *own_tags}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / "README.md")


def _output_of(num_frames: int | None) -> dict[str, str]:
    """What the code of use does with pictures, or with videos of so many frames."""
    if num_frames is None:
        return {"made": "image", "frames": "", "output": "images", "export": "", "import_export": ""}
    return {
        "made": "frames",
        "frames": f", num_frames={num_frames}",
        "output": "frames",
        "export": _EXPORT,
        "import_export": _IMPORT,
    }


def _copy_clips(samples: Path, folder: Path, updates: int) -> str:
    """Puts the last grid of clips of the fixed prompts (docs/logging.md) beside the card; Markdown that shows it, or nothing without one."""
    grids = [path for path in sorted(samples.glob("step_*.gif")) if path.stem[5:].isdigit() and int(path.stem[5:]) <= updates]
    if not grids:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(grids[-1], folder / CLIPS_FILE)
    return f"\n![Clips of fixed prompts after {int(grids[-1].stem[5:])} updates, with their rewards]({CLIPS_FILE})\n"


def _one_line(value: Any) -> str:
    """Text whose line breaks, and whatever else does not show, are written as in Python: so it ends no line of Markdown."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(value))


def _code(value: Any) -> str:
    """Any value as code in Markdown, in a table too: nothing in it is HTML, a cell's end, or the end of the code."""
    text = _one_line(value).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if len(fence) > 1 or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def _plain_text(value: Any) -> str:
    """Any value as text in Markdown."""
    return html.escape(_one_line(value), quote=False)


def _quoted(value: Any) -> str:
    """Any value as a string in Python's code."""
    return json.dumps(str(value), ensure_ascii=not str(value).isprintable())
