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

# Fields of TRL's DDPOConfig and AlignPropConfig (0.23.1) -> options of RLRConfig that mean the same.
SAME_MEANING = {
    **{name: name for name in ("seed", "push_to_hub", "sample_num_steps", "sample_eta", "sample_guidance_scale")},
    **{name: name for name in ("sample_batch_size", "sample_num_batches_per_epoch")},
    **{f"train_{name}": name for name in ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "clip_range")},
    **{f"train_{name}": name for name in ("gradient_accumulation_steps", "max_grad_norm", "num_inner_epochs", "adv_clip_max")},
    "num_epochs": "num_train_epochs",
    "train_batch_size": "per_device_train_batch_size",
    "train_adam_weight_decay": "weight_decay",
    "per_prompt_stat_tracking_buffer_size": "per_prompt_buffer_size",
    "per_prompt_stat_tracking_min_count": "per_prompt_min_count",
    "async_reward_computation": "async_rewards",
}
# Fields that are converted in another way -> where that leads.
CONVERTED = {
    "exp_name": "run_name",
    "run_name": "run_name and output_dir",
    "log_with": "report_to",
    "log_image_freq": "num_log_images and log_images_steps, or an image_samples_hook",
    "tracker_project_name": "project",
    "tracker_kwargs": "the tracker's own environment variables",
    "accelerator_kwargs": "use_cpu and accelerator_config",
    "project_kwargs": "output_dir and save_total_limit",
    "logdir": "output_dir",
    "save_freq": "save_steps, in updates",
    "num_checkpoint_limit": "save_total_limit",
    "resume_from": "resume_from_checkpoint",
    "mixed_precision": "bf16=True or fp16=True",
    "allow_tf32": "tf32",
    "max_workers": "reward_workers",
    "negative_prompts": "negative_prompt",
    "train_use_8bit_adam": "optim='adamw_bnb_8bit'",
    "train_cfg": "sample_guidance_scale, which training uses too",
    "train_timestep_fraction": "rest_num_steps",
    "per_prompt_stat_tracking": "advantage='per_prompt'",
    "truncated_backprop_rand": "fo_steps, two numbers",
    "truncated_backprop_timestep": "fo_steps = sample_num_steps minus it",
    "truncated_rand_backprop_minmax": "fo_steps, two numbers",
}


def meant(name: str, known: Iterable[str]) -> str:
    """What a name that is none of the `known` options may mean, for the end of a message."""
    known = list(known)
    for names in (ELSEWHERE, SAME_MEANING, CONVERTED):
        if name in names:
            return f"here it is {names[name]}"
    near = difflib.get_close_matches(name, known, n=1) or [option for option in known if name in option.split("_")]
    if near:
        return f"did you mean {' or '.join(map(repr, near[:3]))}?"
    return "`rlr-trainer train --help` lists all"
