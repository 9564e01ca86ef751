"""The trainer: gradients against plain autograd, invariants, metrics, errors, hooks."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from rlr_trainer import PlanError, RewardError, RLRConfig, RLRTrainer, digits
from rlr_trainer.digits.rewards import ink
from rlr_trainer.estimators import NonDifferentiableRewardError
from rlr_trainer.estimators.chain import gaussian_log_density, seeded_generator
from rlr_trainer.rewards import jpeg_compressibility
from rlr_trainer.rollouts.batches import NOISE

PROMPTS = (lambda: (digits.PROMPT, {}),)


class Gradients(TrainerCallback):
    """Copies the gradients just before every optimizer step."""

    def __init__(self):
        self.updates = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.updates.append(named)


def gradients_of(make_trainer, **options):
    """Gradients of the updates, unclipped."""
    recorder = Gradients()
    trainer = make_trainer(callbacks=[recorder], max_grad_norm=0.0, **options)
    trainer.train()
    return trainer, recorder.updates


def assert_same(left, right, relative=1e-5):
    assert left.keys() == right.keys()
    assert left
    largest = max(float(tensor.abs().max()) for tensor in right.values())
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=relative * largest, msg=lambda m, n=name: f"{n}: {m}")


def warm_lora(pipeline):
    """LoRA weights that do something: with B = 0 half of the gradients are 0, and a wrong one would not show."""
    from peft import LoraConfig

    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def replay(trainer, pipeline_unet, rollout_number, count):
    """The rollout's latents and log-densities by plain autograd through diffusers' own scheduler."""
    scheduler = copy.deepcopy(trainer.adapter.pipeline.scheduler)
    scheduler.set_timesteps(trainer.args.sample_num_steps)
    embeds = trainer.adapter.pipeline.encode_prompt([digits.PROMPT] * count, "cpu", 1, False)[0].detach()
    generators = [seeded_generator(trainer.args.seed, NOISE, rollout_number, i) for i in range(count)]
    shape = trainer.latent_shape

    def noise():
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    x, steps = noise(), []
    for timestep in scheduler.timesteps:
        steps.append((timestep, noise()))
    return scheduler, embeds, x, steps


def test_full_bp_gradient_equals_plain_autograd_through_the_sampler(make_trainer, pipeline, seven):
    warm_lora(pipeline)
    reference = copy.deepcopy(pipeline)
    trainer, (gradient, *_) = gradients_of(make_trainer, estimator="full_bp", max_steps=1, num_images_per_prompt=1)
    reference.unet.requires_grad_(False)
    leaves = {n: p.requires_grad_(True) for n, p in reference.unet.named_parameters() if "lora_" in n}
    scheduler, embeds, x, steps = replay(trainer, reference.unet, 0, 4)
    for timestep, noise in steps:
        output = reference.unet(x, timestep, embeds).sample
        x = scheduler.step(output, timestep, x, eta=1.0, variance_noise=noise).prev_sample
    images = (reference.vae.decode(x / reference.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    (-seven(images, (), ()).mean()).backward()
    expected = {f"denoiser.{name}": p.grad for name, p in leaves.items()}
    assert_same(gradient, expected, 1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ddpo_gradient_equals_the_score_function_by_hand(make_trainer, pipeline, guidance):
    warm_lora(pipeline)
    reference = copy.deepcopy(pipeline)

    def reward(images, prompts, metadata):
        return images.detach().mean((1, 2, 3))

    trainer, (gradient, *_) = gradients_of(
        make_trainer, estimator="ddpo", advantage="leave_one_out", adv_clip_max=100.0, max_steps=1,
        reward_function=reward, sample_guidance_scale=guidance,
    )  # fmt: skip
    reference.unet.requires_grad_(False)
    leaves = {n: p.requires_grad_(True) for n, p in reference.unet.named_parameters() if "lora_" in n}
    scheduler, embeds, x, steps = replay(trainer, reference.unet, 0, 4)
    empty = reference.encode_prompt([""] * 4, "cpu", 1, False)[0].detach()
    log_density = torch.zeros(4)
    for timestep, noise in steps:
        output = reference.unet(x, timestep, embeds).sample
        if guidance > 1:
            unconditional = reference.unet(x, timestep, empty).sample
            output = unconditional + guidance * (output - unconditional)
        mean = scheduler.step(output, timestep, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        previous = int(timestep) - scheduler.config.num_train_timesteps // len(steps)
        std = scheduler._get_variance(int(timestep), previous).sqrt()
        x = (mean + std * noise).detach()
        log_density = log_density + gaussian_log_density(x, mean, std)
    images = (reference.vae.decode(x / reference.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    rewards = reward(images, (), ())
    advantage = (rewards - rewards.mean()) * 4 / 3  # leave-one-out
    (-(advantage * log_density).mean()).backward()
    expected = {f"denoiser.{name}": p.grad for name, p in leaves.items()}
    assert_same(gradient, expected, 1e-4)


PRESETS = ("rlr", "rlr_paper", "ddpo", "draft", "alignprop", "full_bp", "sqdf", "es")


@pytest.mark.parametrize("estimator", PRESETS)
def test_every_preset_trains_and_logs(make_trainer, estimator):
    options = {"zo_num_perturbations": 2} if estimator in ("rlr_paper", "es") else {}
    trainer = make_trainer(estimator=estimator, **options)
    before = {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}
    trainer.train()
    after = trainer.policy.trainable_parameters()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    frozen = [name for name, p in trainer.policy.named_parameters() if not p.requires_grad]
    assert frozen
    row = next(row for row in trainer.state.log_history if "loss" in row)
    for name in ("reward", "reward_std", "rewards/digit/mean", "rewards/digit/std", "grad_norm", "reward_queries", "samples_dropped",
                 "time/sample", "time/reward", "time/backward"):  # fmt: skip
        assert math.isfinite(row[name]), name
    plan = trainer.plan
    assert ("estimator/fo_grad_norm" in row) == (plan.fo_range[1] > 0)
    assert ("estimator/zo_grad_norm" in row) == plan.uses_zeroth_order
    if plan.scored_steps():
        assert row["ratio/mean"] == 1.0
        assert row["ratio/max_abs_dev"] == 0.0
        assert row["clip_ratio"] == 0.0
    if plan.ho_length:
        assert 0 <= row["estimator/subchain_start"] < plan.num_starts


@pytest.mark.parametrize("options", [{}, {"ho_length": 2}, {"control_variate": True}, {"fo_steps": 4}, {"rest_num_steps": 1}])
def test_graph_and_recursive_give_the_same_gradients(make_trainer, pipeline, options):
    warm_lora(pipeline)
    _, recursive = gradients_of(make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="unused1", **options)
    _, graph = gradients_of(make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="unused2", recompute="graph", **options)
    assert len(recursive) == len(graph) == 2
    assert_same(graph[0], recursive[0], 1e-4)


pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.mark.parametrize("estimator", ["rlr", "ddpo"])
def test_accumulation_does_not_change_the_update(make_trainer, pipeline, estimator):
    warm_lora(pipeline)
    _, whole = gradients_of(make_trainer, estimator=estimator, sd_pipeline=copy.deepcopy(pipeline), output_dir="whole")
    trainer, halves = gradients_of(
        make_trainer, estimator=estimator, sd_pipeline=copy.deepcopy(pipeline), output_dir="halves",
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    assert trainer.state.global_step == 2
    assert_same(halves[0], whole[0], 1e-4)


def test_a_separate_sampling_batch_does_not_change_the_update(make_trainer, pipeline):
    warm_lora(pipeline)
    _, whole = gradients_of(make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="whole")
    _, other = gradients_of(
        make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="other", sample_batch_size=4,
        sample_num_batches_per_epoch=1, per_device_train_batch_size=1, gradient_accumulation_steps=4,
    )  # fmt: skip
    assert_same(other[0], whole[0], 1e-4)


def test_activation_checkpointing_inside_a_step_changes_nothing(make_trainer, pipeline):
    warm_lora(pipeline)
    _, plain = gradients_of(make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="plain")
    trainer, checkpointed = gradients_of(
        make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="checkpointed", gradient_checkpointing=True
    )
    assert trainer.adapter.denoiser.is_gradient_checkpointing
    assert_same(checkpointed[0], plain[0], 1e-5)
    assert next(row for row in trainer.state.log_history if "loss" in row)["ratio/max_abs_dev"] == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"control_variate": True, "fo_steps": 1},  # the network called at weights that are held constant
        {"kl_coef": 0.01, "fo_steps": 2},  # the network differentiated with its LoRA layers off
        {"kl_coef": 0.01, "fo_steps": 2, "use_lora": False},
    ],
    ids=str,
)
def test_activation_checkpointing_of_predictions_and_references(make_trainer, pipeline, options):
    if "use_lora" not in options:
        warm_lora(pipeline)
    options |= {"max_steps": 1, "sample_num_steps": 3, "per_device_train_batch_size": 2, "check_reward": False}
    _, plain = gradients_of(make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="plain", **options)
    trainer, checkpointed = gradients_of(
        make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="checkpointed", gradient_checkpointing=True, **options
    )
    assert_same(checkpointed[0], plain[0], 1e-5)
    if options.get("use_lora") is False:
        assert trainer.reference.copy.denoiser.is_gradient_checkpointing


def test_clipping_leaves_on_policy_updates_alone(make_trainer, pipeline):
    """Another batch size than that of the sampling rounds otherwise; over little noise such a ratio leaves DDPO's clip range."""
    warm_lora(pipeline)
    options = {"estimator": "ddpo", "sample_eta": 3e-4, "sample_batch_size": 4, "per_device_train_batch_size": 1, "sample_num_steps": 3,
               "gradient_accumulation_steps": 4, "num_inner_epochs": 2, "max_steps": 2, "learning_rate": 1e-5}  # fmt: skip
    _, unclipped = gradients_of(
        make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="unclipped", clip_range=None, **options
    )
    trainer, clipped = gradients_of(make_trainer, sd_pipeline=pipeline, output_dir="clipped", clip_range=1e-4, **options)
    first, second = (row for row in trainer.state.log_history if "loss" in row)
    assert first["ratio/max_abs_dev"] > 1e-4
    assert_same(clipped[0], unclipped[0], 1e-6)
    assert first["clip_ratio"] == 0
    assert second["clip_ratio"] > 0
    with pytest.raises(AssertionError, match="not close"):
        assert_same(clipped[1], unclipped[1], 1e-3)


@pytest.mark.parametrize("estimator", ["es", "rlr_paper"])
def test_a_loss_scale_does_not_enter_zeroth_order(make_trainer, pipeline, estimator):
    """As in fp16. With `es` no backward pass sets the scaler up."""
    scaler = torch.amp.GradScaler("cpu")

    class Unscale(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            scaler.unscale_(torch.optim.SGD(model.parameters()))

    warm_lora(pipeline)
    recorder, options = Gradients(), {"estimator": estimator, "zo_num_perturbations": 2, "max_steps": 1}
    _, plain = gradients_of(make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="plain", **options)
    trainer = make_trainer(sd_pipeline=pipeline, callbacks=[Unscale(), recorder], max_grad_norm=0.0, output_dir="scaled", **options)
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert_same(recorder.updates[0], plain[0], 1e-5)


def test_normalized_advantages_scale_the_first_order_part_too(make_trainer, pipeline):
    """Divided by the same standard deviation, FO + LR is the gradient of E[R] / std: parallel to the plain one for FO alone."""
    warm_lora(pipeline)
    _, plain = gradients_of(make_trainer, estimator="full_bp", sd_pipeline=copy.deepcopy(pipeline), output_dir="a")
    trainer, scaled = gradients_of(
        make_trainer, estimator="full_bp", advantage="normalize", sd_pipeline=copy.deepcopy(pipeline), output_dir="b"
    )
    std = next(row["reward_std"] for row in trainer.state.log_history if "reward_std" in row)
    assert_same(scaled[0], {name: g / (std + 1e-8) for name, g in plain[0].items()}, 1e-4)


def test_the_estimator_weights_scale_their_parts(make_trainer, pipeline):
    warm_lora(pipeline)

    def first(name, **options):
        options.setdefault("advantage", "none")
        return gradients_of(make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir=name, **options)[1][0]

    parts = {"fo_steps": 2, "ho_length": 1}
    full = first("full", **parts)
    without_fo = first("a", fo_weight=0.0, **parts)
    without_rest = first("b", ho_weight=0.0, rest_weight=0.0, **parts)
    assert_same({n: without_fo[n] + without_rest[n] for n in full}, full, 1e-4)


def test_off_policy_updates_move_the_ratio_and_use_every_sample(make_trainer):
    trainer = make_trainer(estimator="ddpo", num_inner_epochs=2, sample_num_batches_per_epoch=2, max_steps=4)
    assert trainer.args.updates_per_rollout == 4
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["ratio/max_abs_dev"] == 0.0
    assert all(row["ratio/max_abs_dev"] > 0 for row in rows[1:])
    assert rows[-1]["reward_queries"] == 4 + 8  # the probe, and one rollout of two batches


def test_group_baselines_compare_samples_of_one_prompt(make_trainer):
    names = iter(digits.DIGIT_NAMES * 10)
    seen = []

    def prompts():
        name = next(names)
        return f"a handwritten digit {name}", {"name": name}

    def reward(images, prompts, metadata):
        seen.append((prompts, metadata))
        return images.mean((1, 2, 3))

    trainer = make_trainer(prompt_function=prompts, num_images_per_prompt=2, reward_function=reward, max_steps=1)
    trainer.train()
    texts, metadata = seen[-1]
    assert [m["name"] for m in metadata] == ["zero", "zero", "one", "one"]  # the probe peeked, and lost nothing
    assert texts[0] == texts[1] != texts[2] == texts[3]


def test_dataset_columns_reach_the_reward(make_trainer):
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": [digits.class_prompt(d) for d in range(8)], "digit": list(range(8))})
    seen = []

    def reward(images, prompts, metadata):
        assert all(prompt == digits.class_prompt(m["digit"]) for prompt, m in zip(prompts, metadata, strict=True))
        seen.extend(m["digit"] for m in metadata)
        return images.mean((1, 2, 3))

    trainer = make_trainer(train_dataset=rows, reward_function=reward, max_steps=-1, num_train_epochs=2, check_reward=False)
    trainer.train()
    assert trainer.state.global_step == 4  # 8 prompts in batches of 4, twice
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert seen[:8] != seen[8:]  # shuffled anew


def test_samples_without_a_reward_are_dropped_and_counted(make_trainer, pipeline):
    """Dropping two of four samples gives the gradient of the other two alone."""
    warm_lora(pipeline)

    def partial(images, prompts, metadata):
        values = images.mean((1, 2, 3))
        return torch.where(torch.tensor([True, False, True, False]), values, torch.nan)

    def even(images, prompts, metadata):
        return images.mean((1, 2, 3)) * torch.tensor([1.0, 0.0, 1.0, 0.0]) * 2

    trainer, dropped = gradients_of(
        make_trainer, estimator="full_bp", reward_function=partial, sd_pipeline=copy.deepcopy(pipeline), output_dir="a"
    )
    _, doubled = gradients_of(
        make_trainer, estimator="full_bp", reward_function=even, sd_pipeline=copy.deepcopy(pipeline), output_dir="b"
    )
    assert next(row for row in trainer.state.log_history if "loss" in row)["samples_dropped"] == 2
    assert_same(dropped[0], doubled[0], 1e-4)


def test_several_rewards_are_weighted(make_trainer):
    def dark(images, prompts, metadata):
        return 1 - images.mean((1, 2, 3))

    trainer = make_trainer(reward_function=[ink, dark], reward_weights=[3.0, 1.0], max_steps=1)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["rewards/ink/mean"] + row["rewards/dark/mean"] == pytest.approx(1, abs=1e-5)
    assert row["reward"] == pytest.approx(3 * row["rewards/ink/mean"] + row["rewards/dark/mean"], abs=1e-5)


def test_reward_rises(make_trainer):
    trainer = make_trainer(reward_function=ink, max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, lora_r=4)
    before = trainer.generate([digits.PROMPT] * 16, seed=5).mean()
    trainer.train()
    after = trainer.generate([digits.PROMPT] * 16, seed=5).mean()
    assert after > before + 0.02


def test_black_box_reward_trains_without_first_order(make_trainer):
    trainer = make_trainer(reward_function=jpeg_compressibility, estimator="rlr", fo_steps=0)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("precision", ["bf16"])
def test_ratio_is_exactly_one_in_mixed_precision(make_trainer, precision):
    trainer = make_trainer(estimator="ddpo", **{precision: True})
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["ratio/max_abs_dev"] == 0.0
    assert {p.dtype for p in trainer.policy.trainable_parameters().values()} == {torch.float32}
    assert trainer.adapter.denoiser.conv_in.weight.dtype == torch.bfloat16


def test_same_seed_same_run(make_trainer, pipeline):
    def run(name, seed):
        torch.rand(seed + 3)  # the state of the global generator must not matter
        trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir=name, seed=seed)
        trainer.train()
        return {n: p.detach().clone() for n, p in trainer.policy.trainable_parameters().items()}

    first, again, other = run("a", 0), run("b", 0), run("c", 1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_fixed_seeds_of_generate_do_not_depend_on_the_batch(make_trainer):
    trainer = make_trainer()
    four = trainer.generate([digits.PROMPT] * 6, seed=1)
    trainer.args.sample_batch_size = 3
    three = trainer.generate([digits.PROMPT] * 6, seed=1)
    torch.testing.assert_close(four, three, rtol=0, atol=1e-4)
    assert not torch.equal(four, trainer.generate([digits.PROMPT] * 6, seed=2))


def test_evaluate_uses_fixed_seeds(make_trainer):
    rows = [{"prompt": digits.class_prompt(7)}] * 5
    trainer = make_trainer(eval_dataset=rows, eval_strategy="steps", eval_steps=1)
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first == again
    assert 0 <= first["eval_reward"] <= 1
    trainer.train()
    assert sum("eval_reward" in row for row in trainer.state.log_history) >= 2


def test_ddpo_call_style_epochs(make_trainer):
    trainer = make_trainer()
    trainer.train(3)
    assert trainer.state.global_step == 3


def test_callbacks_fire(make_trainer):
    events = []

    class Recorder(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                events.append(name)
            return super().__getattribute__(name)

    make_trainer(callbacks=[Recorder()], gradient_accumulation_steps=2).train()
    for event in ("on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step",
                  "on_step_end", "on_log", "on_epoch_end", "on_train_end"):  # fmt: skip
        assert event in events, event


def test_image_hook_works_without_a_tracker(make_trainer):
    calls = []

    def hook(batches, step, tracker):
        images, prompts, metadata, rewards, _ = batches[0]
        calls.append((step, images.shape, len(prompts), len(metadata), rewards.shape))
        tracker.log_images({prompts[0]: images[:2]}, step=step)
        tracker.log({"note": 1.0}, step=step)

    trainer = make_trainer(image_samples_hook=hook)
    trainer.train()
    assert calls == [(step, (4, 3, 32, 32), 4, 4, (4,)) for step in (0, 1)]
    assert len(list(Path(trainer.args.output_dir).glob("images/step_*/*.png"))) == 2


def test_tensorboard_gets_metrics_and_pictures(make_trainer, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def hook(batches, step, tracker):
        tracker.log_images({"samples": batches[0][0]}, step=step)

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = make_trainer(image_samples_hook=hook, report_to="tensorboard")
    trainer.train()
    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert "train/reward" in events.Tags()["scalars"]
    assert events.Tags()["images"]


def test_metrics_file_has_one_line_per_log(make_trainer):
    trainer = make_trainer()
    trainer.train()
    lines = [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert lines[0]["reward"] == pytest.approx(trainer.state.log_history[0]["reward"])


# ---- bad input: a clear error before any long work ----


def test_prompt_sources(make_trainer, pipeline, seven):
    config = RLRConfig(output_dir="x", use_cpu=True, sample_num_steps=4)
    with pytest.raises(ValueError, match="exactly one of prompt_function and train_dataset: neither is given"):
        RLRTrainer(config, seven, None, pipeline)
    with pytest.raises(ValueError, match="both are given"):
        RLRTrainer(config, seven, *PROMPTS, pipeline, train_dataset=[{"prompt": "a"}])
    with pytest.raises(ValueError, match="sd_pipeline is None"):
        RLRTrainer(config, seven, *PROMPTS)
    with pytest.raises(TypeError, match="prompt_function='words'"):
        RLRTrainer(config, seven, "words", pipeline)
    with pytest.raises(ValueError, match="reward_weights=.*must be 1 finite numbers, one per reward function"):
        RLRTrainer(RLRConfig(output_dir="x", use_cpu=True, reward_weights=[1.0, 2.0]), seven, *PROMPTS, pipeline)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda i, p, m: torch.ones(3), RewardError, r"shape \(3,\) for a batch of 4"),
        (lambda i, p, m: i.mean(), RewardError, r"shape \(\)"),
        (lambda i, p, m: "good", RewardError, "returned str"),
        (lambda i, p, m: None, RewardError, "returned NoneType"),
        (lambda i, p, m: [torch.nan] * 4, RewardError, "all 4 values"),
        (lambda i, p, m: [1.0, None, "x", 2.0], RewardError, "'x'"),
        (lambda i, p, m: [1.0, math.inf, 1.0, 1.0], RewardError, "infinite"),
    ],
)
def test_wrong_rewards_fail_before_sampling(make_trainer, reward, error, message):
    trainer = make_trainer(reward_function=reward, estimator="ddpo")
    trainer._start_rollout = lambda model: pytest.fail("sampled before the reward was tried")
    with pytest.raises(error, match=message):
        trainer.train()


@pytest.mark.parametrize("reward", [jpeg_compressibility, lambda i, p, m: i.detach().mean((1, 2, 3))])
def test_first_order_with_a_black_box_says_what_to_do(make_trainer, reward):
    trainer = make_trainer(reward_function=reward)
    trainer._start_rollout = lambda model: pytest.fail("sampled before the reward was tried")
    with pytest.raises(NonDifferentiableRewardError, match="choose a plan that needs no reward gradient: estimator='ddpo'"):
        trainer.train()


def test_a_reward_that_drops_its_graph_in_a_list_is_found(make_trainer):
    """The sum has a graph, but the first-order steps would miss the black-box part."""
    trainer = make_trainer(reward_function=[ink, jpeg_compressibility])
    with pytest.raises(NonDifferentiableRewardError, match="'jpeg_compressibility'"):
        trainer.train()


def test_all_nan_rollout_is_an_error(make_trainer):
    trainer = make_trainer(reward_function=lambda i, p, m: [None] * 4, estimator="ddpo", check_reward=False)
    with pytest.raises(RewardError, match="nothing to learn from"):
        trainer.train()


def test_eta_zero_with_a_likelihood_ratio_plan():
    with pytest.raises(PlanError, match=r"sample_eta=0 .* no likelihood ratio.*Set sample_eta above 0"):
        RLRConfig(output_dir="x", use_cpu=True, sample_eta=0.0)
    RLRConfig(output_dir="x", use_cpu=True, sample_eta=0.0, estimator="full_bp")


def test_last_step_without_noise_names_the_step(make_trainer, pipeline):
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    with pytest.raises(PlanError, match=r"step 3 of 4 adds no noise.*fo_steps >= 1"):
        make_trainer(estimator="ddpo")
    make_trainer(estimator="rlr", fo_steps=1).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fo_steps": 5}, r"fo_steps=5: K must lie between 0 and the number of steps, 4"),
        ({"fo_steps": 2, "ho_length": 3}, "ho_length=3"),
        ({"fo_steps": 1, "ho_length": 1, "ho_start": [2, 3]}, "ho_start"),
        ({"estimator": "ppo"}, "estimator='ppo': unknown; choose one of rlr"),
        ({"ho_start": "grad_norm", "log_estimator_norms": False}, "ho_start='grad_norm' with log_estimator_norms=False"),
        ({"advantage": "best"}, "advantage='best': must be one of"),
        ({"recompute": "twice"}, "recompute='twice'"),
        ({"sample_num_steps": 0}, "sample_num_steps=0"),
        ({"clip_range": -1.0}, "clip_range=-1.0"),
        ({"num_images_per_prompt": 3}, "num_images_per_prompt=3: must divide"),
        ({"per_device_train_batch_size": 3, "sample_batch_size": 4}, "must be a multiple of"),
        ({"estimator": "es", "zo_num_perturbations": 3}, "zo_num_perturbations=3"),
        ({"height": 33}, "height=33: must be a positive multiple of 4"),
        ({"sample_num_steps": 5000}, "sample_num_steps=5000: must lie between 1 and the scheduler's 1000"),
    ],
)
def test_options_outside_the_chain(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'fo_step'"):
        RLRConfig(output_dir="x", fo_step=3)


def test_pipeline_without_an_adapter(make_trainer):
    class OtherPipeline:
        config = {}

    with pytest.raises(TypeError, match="OtherPipeline, which has no adapter; supported are StableDiffusionPipeline"):
        make_trainer(sd_pipeline=OtherPipeline())


def test_weights_folder_missing_or_damaged(make_trainer, pipeline, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model_index.json"):
        make_trainer(sd_pipeline=str(tmp_path / "empty"))
    pipeline.save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        make_trainer(sd_pipeline=str(tmp_path / "broken"))
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        make_trainer(sd_pipeline=tmp_path / "broken")


def test_output_folder_of_another_run(make_trainer, pipeline):
    make_trainer(sd_pipeline=copy.deepcopy(pipeline)).train()
    with pytest.raises(ValueError, match=r"holds another run \(metrics.jsonl\).*--overwrite"):
        make_trainer(sd_pipeline=copy.deepcopy(pipeline)).train()
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), overwrite=True)
    trainer.train()
    lines = [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def test_lora_dropout_is_refused(make_trainer):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="lora_dropout=0.1: must be 0"):
        make_trainer(peft_config=LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.1))


def test_integer_numpy_and_list_rewards_are_taken(make_trainer):
    for number, reward in enumerate(
        (lambda i, p, m: np.arange(4), lambda i, p, m: [1, 2, 3, 5], lambda i, p, m: torch.tensor([1, 2, 3, 5]))
    ):
        trainer = make_trainer(reward_function=reward, estimator="ddpo", max_steps=1, output_dir=f"run{number}")
        trainer.train()
        assert next(row["reward"] for row in trainer.state.log_history if "reward" in row) in (1.5, 2.75)


def test_auto_chooses_k_before_the_first_update_and_keeps_it(make_trainer, pipeline):
    options = {"fo_steps": "auto", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    trainer.train()
    chosen = trainer.plan.fo_steps
    assert 0 <= chosen <= 4
    assert trainer.args.fo_steps == "auto"  # the caller's config stays as it was
    state = torch.load(Path(trainer.args.output_dir) / "checkpoint-1" / "rlr_state.pt", weights_only=True)
    assert state["chosen"] == {"fo_steps": chosen}
    resumed = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    resumed._choose_plan = lambda: pytest.fail("chose anew")
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-1"))
    assert resumed.plan == trainer.plan


def test_auto_sub_chain_length_needs_a_budget(make_trainer):
    with pytest.raises(ValueError, match="formula \\(8\\) needs both"):
        make_trainer(ho_length="auto")
    with pytest.raises(ValueError, match="formula \\(8\\) needs both"):
        make_trainer(memory_budget_gb=1.0)
    trainer = make_trainer(
        estimator="rlr_paper", ho_length="auto", memory_budget_gb=1.0, recompute="graph", zo_num_perturbations=2, max_steps=1
    )
    trainer.train()
    assert 1 <= trainer.plan.ho_length <= 3


def test_auto_sub_chain_length_leaves_room_for_first_order(make_trainer, monkeypatch):
    def longest(trainer, memory_budget_gb, *, fo_steps=1):
        return trainer.plan.num_steps - fo_steps

    monkeypatch.setattr("rlr_trainer.diagnosis.auto_ho_length", longest)
    trainer = make_trainer(estimator="rlr", fo_steps=3, ho_length="auto", memory_budget_gb=1.0)
    trainer._choose_plan()
    assert trainer.plan.ho_length == 1
