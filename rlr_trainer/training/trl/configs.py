"""The configs and hooks of TRL's trainers of diffusion models, converted.

TRL 0.23.1 was the last with `DDPOTrainer` and `AlignPropTrainer`. Their configs are converted here field by field
(docs/trl_names.md has the table), and their hooks get the arguments they expect. `names` has those without a counterpart.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from rlr_trainer.training.option_names import CONVERTED, SAME_MEANING

logger = logging.getLogger(__name__)


def adapt_hook(config: Any, hook: Callable[[Any, int, Any], Any] | None) -> Callable[[Any, int, Any], Any] | None:
    """An image hook that takes DDPO's arguments; with an AlignPropConfig one that passes them on as AlignPropTrainer did.

    That one gets a dict of the last batch alone, after every `log_image_freq` updates, with the number of the update.
    """
    if hook is None or trl_config_kind(config) != "alignprop":
        return hook

    def call(batches: Any, global_step: int, tracker: Any) -> None:
        step = global_step + 1
        if step % config.log_image_freq == 0:
            names = ("images", "prompts", "prompt_metadata", "rewards")
            hook(dict(zip(names, batches[-1], strict=False)), step, tracker)

    return call


def mark_mean_density(config: Any, names: set[str]) -> None:
    """Notes on an RLRConfig which options are in DDPOTrainer's unit, for `use_summed_density`."""
    setattr(config, "_mean_density_options", tuple(sorted(names)))  # noqa: B010  # no field: it is no option


def use_summed_density(config: Any, latent_entries: int) -> Any:
    """A DDPOConfig's `train_max_grad_norm` and `train_adam_epsilon` in the unit of this library's gradient.

    DDPOTrainer's log-density is the mean over the D entries of a latent, and its loss the mean over the T steps; here both are sums.
    The gradient is D * T times as large, and an update of AdamW stays the same when these two are as well.

    Args:
        config: an RLRConfig; one that a DDPOConfig was converted to is copied, any other returned as it is.
        latent_entries: D.
    """
    names = getattr(config, "_mean_density_options", ())
    if not names:
        return config
    factor = latent_entries * config.sample_num_steps
    scaled = copy.copy(config)
    for name in names:
        setattr(scaled, name, factor * getattr(config, name))
    mark_mean_density(scaled, set())
    changed = ", ".join(f"{name}={getattr(scaled, name):g}" for name in names)
    logger.info("the gradient of the summed log-density is %d times DDPOTrainer's: %s", factor, changed)
    return scaled


_KINDS = {"DDPOConfig": "ddpo", "AlignPropConfig": "alignprop"}


def _trl_class(config: Any) -> type | None:
    """TRL's own class among those of the config, by name (TRL 0.24 and later have none)."""
    return next((cls for cls in type(config).__mro__ if cls.__name__ in _KINDS), None)


def trl_config_kind(config: Any) -> str | None:
    """ "ddpo" or "alignprop" for TRL's configs of those trainers."""
    trl_class = _trl_class(config)
    return None if trl_class is None else _KINDS[trl_class.__name__]


def options_of_trl_config(config: Any) -> dict[str, Any]:
    """Options of RLRConfig that make the run a DDPOConfig or AlignPropConfig of TRL 0.23.1 describes. Each is logged.

    Raises:
        ValueError: an unknown field; `train_cfg=False` with guidance, which would train another policy than the one that samples;
            a checkpoint of TRL's, an unknown precision or key of project_kwargs.
    """
    kind = trl_config_kind(config)
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    fields = {f.name: given[f.name] for f in dataclasses.fields(_trl_class(config) or type(config))}
    own = sorted(given.keys() - fields.keys())
    if own:  # a script reads them; TRL's trainer never did
        logger.info("%s has fields of its own, which the trainer does not read: %s", type(config).__name__, ", ".join(own))
    unknown = sorted(fields.keys() - SAME_MEANING.keys() - CONVERTED.keys())
    if kind is None or unknown:
        raise ValueError(f"{type(config).__name__} has fields that are not known here ({', '.join(unknown)}): write an RLRConfig")
    options: dict[str, Any] = {SAME_MEANING[name]: value for name, value in fields.items() if name in SAME_MEANING}
    options |= {"estimator": kind, "lora_r": 4, "lora_alpha": 4, "lr_scheduler_type": "constant"}  # what TRL hard-codes
    options["sampler"] = "ddim"  # which TRL puts in place of the pipeline's scheduler
    options["num_log_images"] = 0  # TRL samples and scores nothing beside what it trains on
    options |= _files(fields) | _trackers(fields) | _machine(fields)
    options |= _ddpo_algorithm(fields) if kind == "ddpo" else _alignprop_algorithm(fields)
    negative = fields["negative_prompts"] or ""
    options["negative_prompt"] = negative if isinstance(negative, str) else ", ".join(negative)
    options["optim"] = "adamw_bnb_8bit" if fields["train_use_8bit_adam"] else "adamw_torch"
    logger.info("from %s: %s", type(config).__name__, ", ".join(f"{k}={v!r}" for k, v in sorted(options.items())))
    return options


def _files(fields: dict[str, Any]) -> dict[str, Any]:
    project = dict(fields["project_kwargs"])
    folder = Path(project.pop("project_dir", None) or fields["logdir"])
    updates = 1
    if "sample_batch_size" in fields:
        per_rollout = fields["sample_batch_size"] * fields["sample_num_batches_per_epoch"]
        per_update = fields["train_batch_size"] * fields["train_gradient_accumulation_steps"]
        updates = max(1, per_rollout // per_update) * fields["train_num_inner_epochs"]
    options = {
        "output_dir": str(folder / fields["run_name"]),
        "save_strategy": "steps",
        "save_steps": fields["save_freq"] * updates,
        "save_total_limit": project.pop("total_limit", None) or fields["num_checkpoint_limit"],
        "save_on_each_node": project.pop("save_on_each_node", False),
        "resume_from_checkpoint": _checkpoint(fields["resume_from"]),
        "hub_strategy": "end",  # "Whether to push the final model checkpoint to the Hub"
    }
    for name in ("automatic_checkpoint_naming", "iteration"):  # checkpoints are always named, by their number of updates
        project.pop(name, None)
    logging_dir = project.pop("logging_dir", None)
    if project:
        raise ValueError(f"project_kwargs has keys that are not known here ({', '.join(project)}): write an RLRConfig")
    if logging_dir is not None and "logging_dir" in {f.name for f in dataclasses.fields(transformers.TrainingArguments)}:
        options["logging_dir"] = str(logging_dir)
    elif logging_dir is not None and fields["log_with"] == "tensorboard":
        logger.warning("project_kwargs['logging_dir']=%r: set the environment variable TENSORBOARD_LOGGING_DIR", logging_dir)
    return options


def _checkpoint(resume_from: str | None) -> str | None:
    """The folder to resume from; of a folder of checkpoints the newest, as TRL takes it."""
    if not resume_from:
        return None
    folder = Path(resume_from).expanduser()
    inside = [path for path in folder.glob("checkpoint[-_]*") if re.fullmatch(r"checkpoint[-_]\d+", path.name)]
    ours = sorted((path for path in inside if "-" in path.name[10:11]), key=lambda path: int(path.name[11:]))
    if ours:
        return str(ours[-1])
    if inside or re.fullmatch(r"checkpoint_\d+", folder.name):
        raise ValueError(
            f"resume_from={str(folder)!r} is a checkpoint of TRL's trainer, whose optimizer and counters cannot be taken over: load its "
            "weights, pipe.load_lora_weights(folder), and train on from them without resume_from"
        )
    if not re.fullmatch(r"checkpoint-\d+", folder.name):
        raise ValueError(f"resume_from={str(folder)!r} is neither a checkpoint nor a folder of checkpoints (checkpoint-*)")
    return str(folder)


def _trackers(fields: dict[str, Any]) -> dict[str, Any]:
    tracker, project = fields["log_with"], fields["tracker_project_name"]
    if tracker in ("wandb", "all") or (
        isinstance(tracker, list) and "wandb" in tracker
    ):  # transformers' callback has no option for it
        logger.info("WANDB_PROJECT=%s", os.environ.setdefault("WANDB_PROJECT", project))
    if fields["tracker_kwargs"]:
        logger.warning(
            "tracker_kwargs=%r has no counterpart: transformers' callbacks read the tracker's own environment variables, such as "
            "WANDB_ENTITY and WANDB_TAGS",
            fields["tracker_kwargs"],
        )
    names = [name for name in (fields["exp_name"], fields["run_name"]) if name]
    return {"report_to": tracker or "none", "project": project, "run_name": "-".join(names) or None}


def _machine(fields: dict[str, Any]) -> dict[str, Any]:
    precision = fields["mixed_precision"] or "no"
    if precision not in ("no", "none", "fp16", "bf16"):
        raise ValueError(f"mixed_precision={precision!r}: must be one of no, fp16, bf16")
    accelerator = dict(fields["accelerator_kwargs"])
    use_cpu = bool(accelerator.pop("cpu", False))
    if accelerator:
        logger.warning(
            "accelerator_kwargs=%r has no counterpart: use RLRConfig's accelerator_config, or accelerate launch", accelerator
        )
    on_gpu = torch.cuda.is_available() and not use_cpu
    if precision == "bf16" and not on_gpu and not is_torch_bf16_gpu_available():
        use_cpu = True  # transformers' way to allow it there; accelerate needs no word
    if precision == "fp16" and not on_gpu:
        logger.warning("mixed_precision='fp16' needs a GPU: training in float32")
    return {
        "use_cpu": use_cpu,
        "fp16": precision == "fp16" and on_gpu,
        "bf16": precision == "bf16",
        "tf32": bool(fields["allow_tf32"]) if on_gpu and is_torch_tf32_available() else None,
    }


def _ddpo_algorithm(fields: dict[str, Any]) -> dict[str, Any]:
    if not fields["train_cfg"] and fields["sample_guidance_scale"] > 1:
        raise ValueError(
            f"train_cfg=False with sample_guidance_scale={fields['sample_guidance_scale']}: the policy that trains must be the one that "
            "samples; set sample_guidance_scale=1 or train_cfg=True"
        )
    steps = int(fields["sample_num_steps"] * fields["train_timestep_fraction"])
    return {
        "advantage": "per_prompt" if fields["per_prompt_stat_tracking"] else "normalize",
        "rest_num_steps": steps if steps < fields["sample_num_steps"] else None,
        "reward_workers": fields["max_workers"] if fields["async_reward_computation"] else 1,
    }


def _alignprop_algorithm(fields: dict[str, Any]) -> dict[str, Any]:
    """TRL's truncation step counts from the noisy end; steps before it get no gradient. At least the last step keeps its own."""
    steps = fields["sample_num_steps"]
    if fields["truncated_backprop_rand"]:
        first, last = fields["truncated_rand_backprop_minmax"]
        return {"fo_steps": (max(1, steps - last), max(1, min(steps, steps - first)))}
    truncation = fields["truncated_backprop_timestep"]
    if truncation >= steps:
        logger.warning("truncated_backprop_timestep=%d is past the %d steps: the last step alone is trained", truncation, steps)
    return {"fo_steps": max(1, min(steps, steps - truncation))}
