"""The README.md beside trained weights."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from rlr_trainer import __version__
from rlr_trainer.persistence.metric_names import EVAL_SCORE

GRIDS = {".png": "samples.png", ".gif": "clips.gif"}  # names beside the card, of the pictures or videos of fixed prompts
BUNDLED = re.compile(r"digits(-flow)?|moving-digits")  # models that are no folder of their own
_USE = """```python
{import_pipeline}{import_export}

pipe = {made_by}{scheduler}{load}
{made} = pipe("a prompt", num_inference_steps={steps}, {guidance_argument}={guidance}{eta}{frames}).{output}[0]{export}
```"""
_IMPORT = "\nfrom diffusers.utils import export_to_gif"
_EXPORT = '\nexport_to_gif(frames, "video.gif")'
_DDIM = "\npipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{clip})  # what it was trained with"

_BODY = """
# {title}

{base_sentence} fine-tuned on a reward with rlr_trainer {version}, estimator `{estimator}`.

## Use

{use}
{results}
## Training

{updates} updates, {queries} {made}s scored by {rewards}, for {prompts}.{last}

| option | value |
|---|---|
{options}

Versions: torch {torch}, diffusers {diffusers}, transformers {transformers}.

## Method

Recursive Likelihood Ratio optimizer, "{paper}", [arXiv:{arxiv}](https://arxiv.org/abs/{arxiv}).
"""


def write_model_card(
    trainer: Any,
    folder: Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    scores: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Writes `folder/README.md` for the weights of `trainer`, from the main process; `scores`, name -> (before, after), stand in it."""
    if not trainer.is_world_process_zero():
        return
    args, num_frames = trainer.args, trainer.parts.layout.num_frames
    base = trainer.policy.config.name_or_path
    name = model_name or folder.resolve().name
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    options = args.rlr_options() | {"learning_rate": args.learning_rate, "max_grad_norm": args.max_grad_norm, "seed": args.seed}
    body = _BODY.format(
        title=_plain_text(name),
        base_sentence=_code(_without_folders(base)) if base else "A diffusion pipeline",
        version=__version__,
        estimator=args.estimator,
        use=_use(trainer, trainer.hub_model_id or name),
        results=_results(trainer, folder, scores or {}),
        updates=trainer.state.global_step,
        queries=trainer.rewards.queries * trainer.accelerator.num_processes,
        made="picture" if num_frames is None else "video",
        rewards=", ".join(map(_code, trainer.rewards.names)),
        prompts=_of_prompts(trainer.parts.described_prompts),
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
        base_model=base if base and not Path(base).exists() and not BUNDLED.fullmatch(base) else None,
        datasets=[dataset_name] if dataset_name else None,
        tags=sorted({*trainer._tag_names, *own_tags}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / "README.md")


def _use(trainer: Any, repository: str) -> str:
    """The code that loads the weights from `repository` and samples with them as in training."""
    args, adapter = trainer.args, trainer.adapter
    scheduler = adapter.pipeline.scheduler
    clip = "" if "clip_sample" in scheduler.config else ", clip_sample=False"  # DDIM's default is True
    samplers = {"DDIMScheduler": "ddim", "PNDMScheduler": "ddim"}  # by the pipeline's scheduler, under sampler="auto"
    own = samplers.get(type(scheduler).__name__)
    is_ddim = (own if args.sampler == "auto" else args.sampler) == "ddim"
    source = trainer.policy.config.name_or_path if trainer.use_lora else repository
    return _USE.format(
        **_loading(type(adapter.pipeline).__name__, source, is_ddim),
        load="\n" + adapter.lora_snippet(_quoted(repository)) if trainer.use_lora else "",
        steps=args.sample_num_steps,
        scheduler=_DDIM.format(clip=clip) if is_ddim else "",
        guidance_argument=adapter.guidance_argument,
        guidance=args.sample_guidance_scale,
        eta=f", eta={1.0 if args.sample_eta is None else args.sample_eta}" if is_ddim and args.noise_steps is None else "",
        **_output_of(trainer.parts.layout.num_frames),
    )


def _output_of(num_frames: int | None) -> dict[str, str]:
    """What the code of use does with pictures, or with videos of so many frames."""
    if num_frames is None:
        return {"made": "image", "frames": "", "output": "images", "export": "", "import_export": ""}
    frames = f", num_frames={num_frames}"
    return {"made": "frames", "frames": frames, "output": "frames", "export": _EXPORT, "import_export": _IMPORT}


def _loading(pipeline: str, source: str, is_ddim: bool) -> dict[str, str]:
    """The code that loads the base pipeline, and its import."""
    scheduler = "DDIMScheduler" if is_ddim else ""
    if BUNDLED.fullmatch(source):
        imported = ["from rlr_trainer import digits", *([f"from diffusers import {scheduler}"] if scheduler else [])]
        return {"import_pipeline": "\n".join(sorted(imported)), "made_by": f"digits.load_pipeline({_quoted(source)})"}
    names = ", ".join(filter(None, (scheduler, pipeline)))
    where = f"path/to/{_without_folders(source)}" if Path(source).is_absolute() else source or "the base pipeline"
    return {"import_pipeline": f"from diffusers import {names}", "made_by": f"{pipeline}.from_pretrained({_quoted(where)})"}


def _without_folders(source: str) -> str:
    """A name or hub id as it is; of an absolute path the last part: the others say nothing to a reader elsewhere."""
    return Path(source).name if Path(source).is_absolute() else source


def _of_prompts(described: Mapping[str, Any]) -> str:
    if "rows" not in described:
        return f"prompts of the function {_code(described['function'])}"
    first, rows = described["first"][0], described["rows"]
    return f"the prompt {_code(first)}" if rows == 1 else f"{rows} prompts, the first of them {_code(first)}"


def _results(trainer: Any, folder: Path, scores: Mapping[str, tuple[float, float]]) -> str:
    """Pictures of the fixed prompts, and scores that were not trained on: of evaluations the first and the last."""
    history = [row for row in trainer.state.log_history if any(map(EVAL_SCORE.fullmatch, row))]
    values = {
        name: [row[name] for row in history if name in row]
        for name in dict.fromkeys(name for row in history for name in row if EVAL_SCORE.fullmatch(name))
    }
    rows = [(name, f"{before:.4g}", f"{after:.4g}") for name, (before, after) in scores.items()]
    rows += [(name, f"{found[0]:.4g}", f"{found[-1]:.4g}") for name, found in values.items()]
    table = "".join(f"| {_code(name)} | {first} | {last} |\n" for name, first, last in rows)
    shown = _copy_grid(Path(trainer.args.output_dir) / "samples", folder, trainer.state.global_step)
    if table:
        kind = "before and after the training" if scores else "the first evaluation and the last"
        shown += f"\nScores, {kind}:\n\n| score | first | last |\n|---|---|---|\n{table}"
    return shown


def _copy_grid(samples: Path, folder: Path, updates: int) -> str:
    """Puts the last grid of the fixed prompts (docs/logging.md) beside the card; Markdown that shows it, or nothing without one."""
    for ending in (".gif", ".png"):  # a grid of videos is there as strips, too
        grids = [
            path for path in sorted(samples.glob(f"step_*{ending}")) if path.stem[5:].isdigit() and int(path.stem[5:]) <= updates
        ]
        if grids:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(grids[-1], folder / GRIDS[ending])
            what = "Clips" if ending == ".gif" else "Pictures"
            return f"\n![{what} of fixed prompts after {int(grids[-1].stem[5:])} updates, with their rewards]({GRIDS[ending]})\n"
    return ""


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
