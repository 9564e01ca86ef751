"""TRL's configs, converted. The classes are TRL's own where this TRL has them, else stand-ins with the same fields."""

import copy
import dataclasses

import pytest

from rlr_trainer import RLRConfig, RLRTrainer, compat, digits


def trl_class(name):
    try:
        module = __import__("trl", fromlist=[name])
        return getattr(module, name)
    except (ImportError, AttributeError):
        return None


def ddpo_config(**options):
    real = trl_class("DDPOConfig")
    if real is not None:
        return real(**options)
    defaults = {
        "exp_name": "x", "run_name": "", "seed": 0, "log_with": None, "tracker_kwargs": {}, "accelerator_kwargs": {}, "project_kwargs": {},
        "tracker_project_name": "trl", "logdir": "logs", "num_epochs": 100, "save_freq": 1, "num_checkpoint_limit": 5, "mixed_precision": "fp16",
        "allow_tf32": True, "resume_from": "", "sample_num_steps": 50, "sample_eta": 1.0, "sample_guidance_scale": 5.0, "sample_batch_size": 1,
        "sample_num_batches_per_epoch": 2, "train_batch_size": 1, "train_use_8bit_adam": False, "train_learning_rate": 3e-4,
        "train_adam_beta1": 0.9, "train_adam_beta2": 0.999, "train_adam_weight_decay": 1e-4, "train_adam_epsilon": 1e-8,
        "train_gradient_accumulation_steps": 1, "train_max_grad_norm": 1.0, "train_num_inner_epochs": 1, "train_cfg": True,
        "train_adv_clip_max": 5.0, "train_clip_range": 1e-4, "train_timestep_fraction": 1.0, "per_prompt_stat_tracking": False,
        "per_prompt_stat_tracking_buffer_size": 16, "per_prompt_stat_tracking_min_count": 16, "async_reward_computation": False,
        "max_workers": 2, "negative_prompts": "", "push_to_hub": False,
    }  # fmt: skip
    fields = [
        (k, type(v), dataclasses.field(default_factory=dict) if v == {} else dataclasses.field(default=v))
        for k, v in defaults.items()
    ]
    return dataclasses.make_dataclass("DDPOConfig", fields)(**options)


def test_every_field_is_honoured_or_explained():
    config = ddpo_config(
        seed=3, num_epochs=7, sample_num_steps=20, sample_batch_size=8, sample_num_batches_per_epoch=2, train_batch_size=4,
        train_gradient_accumulation_steps=2, train_learning_rate=1e-3, save_freq=5, num_checkpoint_limit=2, mixed_precision="no",
        train_num_inner_epochs=2, per_prompt_stat_tracking=True, negative_prompts="blurred", train_timestep_fraction=0.5, logdir="here",
        run_name="mine", train_adv_clip_max=3.0,
    )  # fmt: skip
    converted = RLRConfig.from_ddpo(config, use_cpu=True)
    assert converted.estimator == "ddpo"
    assert (converted.seed, converted.num_train_epochs, converted.learning_rate) == (3, 7, 1e-3)
    assert converted.updates_per_rollout == 4
    assert converted.save_steps == 20  # every five epochs of four updates
    assert converted.save_total_limit == 2
    assert converted.advantage == "per_prompt"
    assert converted.rest_num_steps == 10
    assert converted.negative_prompt == "blurred"
    assert converted.adv_clip_max == 3.0
    assert converted.output_dir in ("here/mine", "here\\mine")
    assert (converted.lora_r, converted.lora_alpha) == (4, 4)


def test_fields_without_a_counterpart_are_logged(caplog):
    RLRConfig.from_ddpo(ddpo_config(mixed_precision="no", async_reward_computation=True), use_cpu=True)
    assert "async_reward_computation=True has no counterpart: rewards are computed in the main thread" in caplog.text
    assert "max_workers" not in caplog.text


def test_guidance_of_sampling_and_training_cannot_differ():
    with pytest.raises(ValueError, match="train_cfg=False with sample_guidance_scale=5.0"):
        RLRConfig.from_ddpo(ddpo_config(train_cfg=False, mixed_precision="no"))


def test_a_ddpo_script_runs_with_the_class_name_changed(pipeline, seven, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compat.torch.cuda, "is_available", lambda: False)

    class DefaultDDPOStableDiffusionPipeline:  # what TRL's class looks like from outside
        use_lora = True
        sd_pipeline = copy.deepcopy(pipeline)

    images = []
    config = ddpo_config(num_epochs=2, sample_num_steps=4, sample_batch_size=2, train_batch_size=2, sample_guidance_scale=2.0)

    def reward(images, prompts, metadata):
        return seven(images, prompts, metadata), {"note": "kept"}

    trainer = RLRTrainer(
        config,
        reward,
        lambda: (digits.PROMPT, {}),
        DefaultDDPOStableDiffusionPipeline(),
        lambda data, step, tracker: images.append(data),
    )
    trainer.train()
    assert trainer.state.global_step == 4  # two epochs of two batches
    assert len(images) == 2
    assert images[0][0][4] == {"note": "kept"}
    assert (tmp_path / "logs" / "checkpoint-4").is_dir()


@pytest.mark.skipif(trl_class("AlignPropConfig") is None, reason="this TRL has no AlignPropConfig")
def test_alignprop_config():
    config = trl_class("AlignPropConfig")(mixed_precision="no", sample_num_steps=20, truncated_rand_backprop_minmax=(5, 15))
    converted = RLRConfig.from_trl(config, use_cpu=True)
    assert converted.plan.fo_steps == (5, 15)
    fixed = trl_class("AlignPropConfig")(mixed_precision="no", sample_num_steps=50, truncated_backprop_rand=False)
    assert RLRConfig.from_trl(fixed, use_cpu=True).plan.fo_steps == 1
