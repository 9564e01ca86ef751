"""The README.md beside trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

_USE = """```python
from diffusers import {imports}{pipeline}

pipe = {pipeline}.from_pretrained("{source}"){scheduler}{load}
image = pipe("a prompt", num_inference_steps={steps}, {guidance_argument}={guidance}{eta}).images[0]
```"""
_DDIM = "\npipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # what it was trained with"

_BODY = """
# {title}

{base_sentence} fine-tuned on a reward with [rlr_trainer](https://pypi.org/project/rlr-trainer/), estimator `{estimator}`.

## Use

{use}

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
    args = trainer.args
    base = trainer.policy.config.name_or_path
    title = model_name or folder.resolve().name
    repository = trainer.hub_model_id or title
    samplers = {"DDIMScheduler": "ddim", "PNDMScheduler": "ddim"}  # by the pipeline's scheduler, under sampler="auto"
    own = samplers.get(type(trainer.adapter.pipeline.scheduler).__name__)
    is_ddim = (own if args.sampler == "auto" else args.sampler) == "ddim"
    use = _USE.format(
        pipeline=type(trainer.adapter.pipeline).__name__,
        source=(base or "the base pipeline") if trainer.use_lora else repository,
        load="\n" + trainer.adapter.lora_snippet(repository) if trainer.use_lora else "",
        steps=args.sample_num_steps,
        imports="DDIMScheduler, " if is_ddim else "",
        scheduler=_DDIM if is_ddim else "",
        guidance_argument=trainer.adapter.guidance_argument,
        guidance=args.sample_guidance_scale,
        eta=f", eta={1.0 if args.sample_eta is None else args.sample_eta}" if is_ddim else "",
    )
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    options = args.rlr_options() | {"learning_rate": args.learning_rate, "max_grad_norm": args.max_grad_norm, "seed": args.seed}
    body = _BODY.format(
        title=title,
        base_sentence=f"`{base}`" if base else "A diffusion pipeline",
        estimator=args.estimator,
        use=use,
        updates=trainer.state.global_step,
        queries=trainer.rewards.queries * trainer.accelerator.num_processes,
        rewards=", ".join(f"`{name}`" for name in trainer.rewards.names),
        last=f" Mean reward of the first rollout {rewards[0]:.4g}, of the last {rewards[-1]:.4g}." if rewards else "",
        options="\n".join(f"| `{name}` | `{value}` |" for name, value in options.items() if value is not None),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
        paper=trainer._paper["title"],
        arxiv=trainer._paper["id"],
    )
    own_tags = [tags] if isinstance(tags, str) else list(tags or [])
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base if base and not Path(base).exists() else None,
        datasets=[dataset_name] if dataset_name else None,
        tags=sorted({*trainer._tag_names, *own_tags}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / "README.md")
