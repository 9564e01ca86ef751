"""Everything that differs between versions of TRL and transformers, and TRL's configs of the trainers that this one follows."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import transformers

logger = logging.getLogger(__name__)

try:
    from trl.trainer.base_trainer import _BaseTrainer as _TRLBaseTrainer
except ImportError:  # TRL 0.23 has no common base: its trainers subclass transformers.Trainer and bring these members themselves

    class _TRLBaseTrainer(transformers.Trainer):  # type: ignore[no-redef]
        _tag_names: list[str] = []
        _name = "Base"
        _paper: dict[str, str] = {}
        _template_file: str | None = None


class BaseTrainer(_TRLBaseTrainer):
    """TRL's trainer base, the same members in every supported version."""

    def _send_telemetry(self) -> None:
        """TRL reports its own trainers' use; this library reports nothing."""


# Fields of TRL's DDPOConfig and AlignPropConfig (0.23.1) -> options of RLRConfig that mean the same.
SAME_MEANING = {
    "seed": "seed",
    "num_epochs": "num_train_epochs",
    "num_checkpoint_limit": "save_total_limit",
    "sample_num_steps": "sample_num_steps",
    "sample_eta": "sample_eta",
    "sample_guidance_scale": "sample_guidance_scale",
    "sample_batch_size": "sample_batch_size",
    "sample_num_batches_per_epoch": "sample_num_batches_per_epoch",
    "train_batch_size": "per_device_train_batch_size",
    "train_learning_rate": "learning_rate",
    "train_adam_beta1": "adam_beta1",
    "train_adam_beta2": "adam_beta2",
    "train_adam_weight_decay": "weight_decay",
    "train_adam_epsilon": "adam_epsilon",
    "train_gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_max_grad_norm": "max_grad_norm",
    "train_num_inner_epochs": "num_inner_epochs",
    "train_adv_clip_max": "adv_clip_max",
    "train_clip_range": "clip_range",
    "per_prompt_stat_tracking_buffer_size": "per_prompt_buffer_size",
    "per_prompt_stat_tracking_min_count": "per_prompt_min_count",
    "push_to_hub": "push_to_hub",
}
# Fields without an option of ours, and what to do instead; said once when they differ from their default.
WITHOUT_OPTION = {
    "exp_name": "name the run with run_name or output_dir",
    "tracker_kwargs": "trackers are set up by transformers' callbacks, through environment variables",
    "tracker_project_name": "set the tracker's own environment variable, such as WANDB_PROJECT",
    "accelerator_kwargs": "use accelerator_config, or accelerate launch",
    "async_reward_computation": "rewards are computed in the main thread",
    "max_workers": "rewards are computed in the main thread",
    "log_image_freq": "image_samples_hook is called after every rollout; skip the ones you do not want",
}
_CONVERTED = {
    *(
        "log_with",
        "logdir",
        "project_kwargs",
        "save_freq",
        "mixed_precision",
        "allow_tf32",
        "resume_from",
        "run_name",
        "negative_prompts",
    ),
    *("train_use_8bit_adam", "train_cfg", "train_timestep_fraction", "per_prompt_stat_tracking"),
    *("truncated_backprop_rand", "truncated_backprop_timestep", "truncated_rand_backprop_minmax"),
}


def trl_config_kind(config: Any) -> str | None:
    """ "ddpo" or "alignprop" for TRL's configs of those trainers, by class name (TRL 0.24 and later have none)."""
    names = {cls.__name__ for cls in type(config).__mro__}
    return "ddpo" if "DDPOConfig" in names else "alignprop" if "AlignPropConfig" in names else None


def options_of_trl_config(config: Any) -> dict[str, Any]:
    """Options of RLRConfig that make the run a DDPOConfig or AlignPropConfig of TRL 0.23.1 describes. Each is logged.

    Raises:
        ValueError: `train_cfg=False` with guidance: it would train another policy than the one that samples; or an unknown field.
    """
    kind = trl_config_kind(config)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    unknown = sorted(fields.keys() - SAME_MEANING.keys() - WITHOUT_OPTION.keys() - _CONVERTED)
    if kind is None or unknown:
        raise ValueError(f"{type(config).__name__} has fields that are not known here ({', '.join(unknown)}): write an RLRConfig")
    options: dict[str, Any] = {SAME_MEANING[name]: value for name, value in fields.items() if name in SAME_MEANING}
    options |= {"estimator": kind, "lora_r": 4, "lora_alpha": 4, "lr_scheduler_type": "constant"}  # what TRL hard-codes
    options |= _files_and_precision(fields)
    options |= _ddpo_algorithm(fields) if kind == "ddpo" else _alignprop_algorithm(fields)
    for name, advice in WITHOUT_OPTION.items():
        default = next((f for f in dataclasses.fields(config) if f.name == name), None)
        if default is not None and name != "exp_name" and fields[name] not in (default.default, {}):
            logger.warning("%s.%s=%r has no counterpart: %s", type(config).__name__, name, fields[name], advice)
    logger.info("from %s: %s", type(config).__name__, ", ".join(f"{k}={v!r}" for k, v in sorted(options.items())))
    return options


def _files_and_precision(fields: dict[str, Any]) -> dict[str, Any]:
    folder = fields["project_kwargs"].get("project_dir") or fields["logdir"]
    updates = 1
    if "sample_batch_size" in fields:
        per_rollout = fields["sample_batch_size"] * fields["sample_num_batches_per_epoch"]
        per_update = fields["train_batch_size"] * fields["train_gradient_accumulation_steps"]
        updates = max(1, per_rollout // per_update) * fields["train_num_inner_epochs"]
    on_gpu = torch.cuda.is_available()
    precision = fields["mixed_precision"]
    if precision == "fp16" and not on_gpu:
        logger.warning("mixed_precision='fp16' needs a GPU: training in float32")
    return {
        "output_dir": str(Path(folder) / fields["run_name"]) if fields["run_name"] else str(folder),
        "report_to": fields["log_with"] or "none",
        "save_strategy": "steps",
        "save_steps": fields["save_freq"] * updates,
        "fp16": precision == "fp16" and on_gpu,
        "bf16": precision == "bf16",
        "tf32": True if fields["allow_tf32"] and on_gpu else None,
        "negative_prompt": fields["negative_prompts"] or "",
        "optim": "adamw_bnb_8bit" if fields["train_use_8bit_adam"] else "adamw_torch",
        "resume_from_checkpoint": fields["resume_from"] or None,
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
    }


def _alignprop_algorithm(fields: dict[str, Any]) -> dict[str, Any]:
    steps = fields["sample_num_steps"]
    if fields["truncated_backprop_rand"]:
        first, last = fields["truncated_rand_backprop_minmax"]
        return {"fo_steps": (max(1, steps - last), max(1, min(steps, steps - first)))}
    return {"fo_steps": max(1, steps - fields["truncated_backprop_timestep"])}
