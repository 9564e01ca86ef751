"""What names that are no options may mean. Needs no torch, so that the command line can say it at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names of options in diffusers, its training scripts and trainers of language models -> the option here.
ELSEWHERE = {
    **dict.fromkeys(("guidance_scale", "guidance", "cfg", "cfg_scale"), "sample_guidance_scale"),
    **dict.fromkeys(
        ("num_inference_steps", "inference_steps", "num_steps", "sampling_steps", "num_sampling_steps"), "sample_num_steps"
    ),
    **dict.fromkeys(("batch_size", "per_gpu_batch_size", "micro_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("lora_rank", "rank", "network_dim", "lora_dim"), "lora_r"),
    **dict.fromkeys(("alpha", "network_alpha"), "lora_alpha"),
    **dict.fromkeys(("target_modules", "lora_modules"), "lora_target_modules"),
    **dict.fromkeys(("max_train_steps", "num_train_steps", "train_steps", "steps", "num_updates"), "max_steps"),
    **dict.fromkeys(("epochs", "max_epochs", "max_train_epochs"), "num_train_epochs"),
    **dict.fromkeys(("num_generations", "group_size", "num_image_per_prompt"), "num_images_per_prompt"),
    **dict.fromkeys(("kl", "beta", "kl_beta", "kl_weight"), "kl_coef"),
    **dict.fromkeys(("resolution", "image_size", "size"), "height and width"),
    **dict.fromkeys(("output_folder", "save_dir"), "output_dir"),
    **dict.fromkeys(("checkpointing_steps", "save_every", "save_every_n_steps"), "save_steps"),
    **dict.fromkeys(("checkpoints_total_limit", "max_step_saves_to_keep"), "save_total_limit"),
    **dict.fromkeys(("validation_steps", "sample_every"), "log_images_steps"),
    **dict.fromkeys(("lr_scheduler", "scheduler_type"), "lr_scheduler_type"),
    **dict.fromkeys(("truncated_steps", "backprop_steps"), "fo_steps"),
    "lr": "learning_rate",
    "lr_warmup_steps": "warmup_steps",
    "eta": "sample_eta",
    "optimizer": "optim",
    "ema": "ema_decay",
    "algorithm": "estimator",
    "reward": "the argument reward_function of RLRTrainer (in a run's file: reward)",
    "model": "the argument sd_pipeline of RLRTrainer (in a run's file: model)",
    "prompts": "the argument prompt_function or train_dataset of RLRTrainer (in a run's file: prompts)",
}


def meant(name: str, known: Iterable[str]) -> str:
    """What a name that is none of the `known` options may mean, for the end of a message."""
    known = list(known)
    if name in ELSEWHERE:
        return f"here it is {ELSEWHERE[name]}"
    near = difflib.get_close_matches(name, known, n=1) or [option for option in known if name in option.split("_")]
    if near:
        return f"did you mean {' or '.join(map(repr, near[:3]))}?"
    return "`rlr-trainer train --help` lists all"
