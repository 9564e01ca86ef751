"""TRL 0.23.1's DDPOConfig and AlignPropConfig: its own where it is installed, else stand-ins with the same fields and defaults."""

import dataclasses

COMMON = {
    "exp_name": "", "run_name": "", "seed": 0, "log_with": None, "tracker_kwargs": {}, "accelerator_kwargs": {}, "project_kwargs": {},
    "tracker_project_name": "trl", "logdir": "logs", "num_epochs": 100, "save_freq": 1, "num_checkpoint_limit": 5, "mixed_precision": "fp16",
    "allow_tf32": True, "resume_from": "", "sample_num_steps": 50, "sample_eta": 1.0, "sample_guidance_scale": 5.0, "train_batch_size": 1,
    "train_use_8bit_adam": False, "train_adam_beta1": 0.9, "train_adam_beta2": 0.999, "train_adam_weight_decay": 1e-4,
    "train_adam_epsilon": 1e-8, "train_gradient_accumulation_steps": 1, "train_max_grad_norm": 1.0, "push_to_hub": False,
}  # fmt: skip
DDPO = COMMON | {
    "sample_batch_size": 1, "sample_num_batches_per_epoch": 2, "train_learning_rate": 3e-4, "train_num_inner_epochs": 1, "train_cfg": True,
    "train_adv_clip_max": 5.0, "train_clip_range": 1e-4, "train_timestep_fraction": 1.0, "per_prompt_stat_tracking": False,
    "per_prompt_stat_tracking_buffer_size": 16, "per_prompt_stat_tracking_min_count": 16, "async_reward_computation": False,
    "max_workers": 2, "negative_prompts": "",
}  # fmt: skip
ALIGNPROP = COMMON | {
    "log_image_freq": 1, "train_learning_rate": 1e-3, "negative_prompts": None, "truncated_backprop_rand": True,
    "truncated_backprop_timestep": 49, "truncated_rand_backprop_minmax": (0, 50),
}  # fmt: skip
FIELDS = {"DDPOConfig": DDPO, "AlignPropConfig": ALIGNPROP}


def trl_class(name):
    """A class of the installed TRL, or None."""
    try:
        return getattr(__import__("trl", fromlist=[name]), name)
    except (ImportError, AttributeError):
        return None


def make(name, **options):
    """A config of this class; float32, unless the options say otherwise."""
    real = trl_class(name)
    options = {"mixed_precision": "no"} | options
    if real is not None:
        return real(**options)
    fields = [
        (key, type(value), dataclasses.field(default_factory=dict) if value == {} else dataclasses.field(default=value))
        for key, value in FIELDS[name].items()
    ]
    return dataclasses.make_dataclass(name, fields)(**options)


def ddpo_config(**options):
    return make("DDPOConfig", **options)


def alignprop_config(**options):
    return make("AlignPropConfig", **options)
