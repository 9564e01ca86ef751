"""The trainer: gradients against plain autograd, invariants, metrics, errors, hooks."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from warm_weights import warm_lora

from rlr_trainer import PlanError, RewardError, RLRConfig, RLRTrainer, digits
from rlr_trainer.digits.rewards import ink
from rlr_trainer.estimators.chain import gaussian_log_density, seeded_generator
from rlr_trainer.rollouts.batches import NOISE
from rlr_trainer.rollouts.prompts import PromptRow
from rlr_trainer.schedules import SamplerOptions, make_schedule
from rlr_trainer.training import running

pytestmark = pytest.mark.usefixtures("in_temporary_folder")

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


def replay(trainer, pipeline_unet, rollout_number, count):
    """The rollout's latents and log-densities by plain autograd through diffusers' own scheduler."""
    scheduler = copy.deepcopy(trainer.adapter.pipeline.scheduler)
    scheduler.set_timesteps(trainer.args.sample_num_steps)
    embeds = trainer.adapter.pipeline.encode_prompt([digits.PROMPT] * count, "cpu", 1, False)[0].detach()
    generators = [seeded_generator(trainer.args.seed, NOISE, rollout_number, i) for i in range(count)]
    shape = trainer.parts.layout.shape

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


def test_ddpo_gradient_equals_the_score_function_by_hand(make_trainer, pipeline):
    guidance = 3.0
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


@pytest.mark.parametrize("options", [{}, {"estimator": "rlr_paper", "zo_num_perturbations": 2}], ids=str)
def test_a_run_trains_and_logs(make_trainer, options):
    trainer = make_trainer(**options)
    before = {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}
    trainer.train()
    after = trainer.policy.trainable_parameters()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    frozen = [name for name, p in trainer.policy.named_parameters() if not p.requires_grad]
    assert frozen
    row = next(row for row in trainer.state.log_history if "loss" in row)
    for name in ("reward", "reward_std", "rewards/digit_7/mean", "rewards/digit_7/std", "grad_norm", "reward_queries", "samples_dropped",
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


@pytest.mark.parametrize(
    "options",
    [
        {"control_variate": True, "fo_steps": 1},  # the network called at weights that are held constant
        {"kl_coef": 0.01, "fo_steps": 2},  # the network differentiated with its LoRA layers off
        {"kl_coef": 0.01, "fo_steps": 2, "use_lora": False},
    ],
    ids=str,
)
@pytest.mark.medium
def test_activation_checkpointing_changes_nothing(make_trainer, pipeline, options):
    if "use_lora" not in options:
        warm_lora(pipeline)
    options |= {"max_steps": 1, "sample_num_steps": 3, "per_device_train_batch_size": 2, "check_reward": False}
    _, plain = gradients_of(make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="plain", **options)
    trainer, checkpointed = gradients_of(
        make_trainer, sd_pipeline=copy.deepcopy(pipeline), output_dir="checkpointed", gradient_checkpointing=True, **options
    )
    assert_same(checkpointed[0], plain[0], 1e-5)
    assert trainer.adapter.denoiser.is_gradient_checkpointing
    if options.get("use_lora") is False:
        assert trainer.parts.reference.copy.denoiser.is_gradient_checkpointing


@pytest.mark.medium
def test_clipping_leaves_on_policy_updates_alone(make_trainer, pipeline):
    """Another batch size than that of the sampling rounds otherwise; over little noise such a ratio leaves DDPO's clip range."""
    options = {"estimator": "ddpo", "sample_eta": 3e-4, "sample_batch_size": 4, "per_device_train_batch_size": 1, "sample_num_steps": 3,
               "gradient_accumulation_steps": 4, "num_inner_epochs": 2, "max_steps": 2, "learning_rate": 1e-5}  # fmt: skip
    trainer = make_trainer(sd_pipeline=warm_lora(pipeline), clip_range=1e-4, **options)
    trainer.train()
    first, second = (row for row in trainer.state.log_history if "loss" in row)
    assert first["ratio/max_abs_dev"] > 1e-4
    assert first["clip_ratio"] == 0
    assert second["clip_ratio"] > 0


@pytest.mark.medium
def test_off_policy_updates_move_the_ratio_and_use_every_sample(make_trainer):
    trainer = make_trainer(estimator="ddpo", num_inner_epochs=2, sample_num_batches_per_epoch=2, max_steps=4)
    assert trainer.args.updates_per_rollout == 4
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["ratio/max_abs_dev"] == 0.0
    assert all(row["ratio/max_abs_dev"] > 0 for row in rows[1:])
    assert rows[-1]["reward_queries"] == 4 + 8  # the probe, and one rollout of two batches


@pytest.mark.medium
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


def test_reward_rises(make_trainer):
    trainer = make_trainer(reward_function=ink, max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, lora_r=4)
    before = trainer.generate([digits.PROMPT] * 16, seed=5).mean()
    trainer.train()
    after = trainer.generate([digits.PROMPT] * 16, seed=5).mean()
    assert after > before + 0.02


@pytest.mark.medium
def test_same_seed_same_run(make_trainer, pipeline):
    def run(name, seed):
        torch.rand(seed + 3)  # the state of the global generator must not matter
        trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir=name, seed=seed)
        trainer.train()
        return {n: p.detach().clone() for n, p in trainer.policy.trainable_parameters().items()}

    first, again, other = run("a", 0), run("b", 0), run("c", 1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.medium
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


# ---- bad input: a clear error before any long work ----


def test_prompt_sources(make_trainer, pipeline, seven):
    config = RLRConfig(output_dir="x", use_cpu=True, sample_num_steps=4)
    with pytest.raises(ValueError, match="exactly one of prompt_function and train_dataset: neither is given"):
        RLRTrainer(config, seven, None, pipeline)
    with pytest.raises(ValueError, match="both are given"):
        RLRTrainer(config, seven, *PROMPTS, pipeline, train_dataset=[{"prompt": "a"}])
    with pytest.raises(ValueError, match="sd_pipeline is None: .* by name or as the fourth argument"):
        RLRTrainer(config, seven, *PROMPTS)
    with pytest.raises(TypeError, match="prompt_function='words'"):
        RLRTrainer(config, seven, "words", pipeline)
    with pytest.raises(ValueError, match="reward_weights=.*must be 1 finite numbers, one per reward function"):
        RLRTrainer(RLRConfig(output_dir="x", use_cpu=True, reward_weights=[1.0, 2.0]), seven, *PROMPTS, pipeline)


def test_a_wrong_reward_fails_before_the_sampling(make_trainer, monkeypatch):
    trainer = make_trainer(reward_function=lambda i, p, m: torch.ones(3), estimator="ddpo")
    monkeypatch.setattr(running, "start_rollout", lambda *arguments: pytest.fail("sampled before the reward was tried"))
    with pytest.raises(RewardError, match=r"shape \(3,\) for a batch of 4"):
        trainer.train()


@pytest.mark.medium
def test_rewards_that_overflow_stop_the_run(make_trainer):
    """The gradient's norm would be infinite, and clipped by it every entry 0: the weights stayed put, and nothing was said."""

    def steep(images, prompts, metadata):
        values = images.mean((1, 2, 3))
        return 1e25 * (values - values.detach())

    trainer = make_trainer(reward_function=steep)
    with pytest.raises(
        FloatingPointError, match=r"update 1: the norm of the gradient is inf, .* bring the reward and its gradient"
    ):
        trainer.train()


def test_eta_zero_with_a_likelihood_ratio_plan():
    with pytest.raises(PlanError, match=r"sample_eta=0 .* no likelihood ratio.*Set sample_eta above 0"):
        RLRConfig(output_dir="x", use_cpu=True, sample_eta=0.0)
    RLRConfig(output_dir="x", use_cpu=True, sample_eta=0.0, estimator="full_bp")


def test_rlr_black_box_puts_its_noise_in_the_first_third(make_trainer):
    trainer = make_trainer(estimator="rlr_black_box", sample_num_steps=5, reward_function=lambda images, p, m: [1.0, 2.0, 3.0, 4.0])
    assert [std > 0 for std in trainer.parts.schedule.stds] == [True, True, False, False, False]
    assert (trainer.plan.scored_steps(), trainer.args.advantage_name) == ([0, 1], "normalize")
    wider = make_trainer(estimator="rlr_black_box", sample_num_steps=5, noise_steps=[1, 3])
    assert wider.plan.scored_steps() == [1, 2, 3]


def test_flow_grpo_and_mixgrpo_sample_as_published(make_trainer):
    flow = digits.load_pipeline("digits-flow")
    trainer = make_trainer(estimator="flow_grpo", sample_num_steps=5, sd_pipeline=flow)
    config = trainer.args
    assert (config.sampler, config.kl_coef, config.clip_range) == ("flow_sde", pytest.approx(0.04 / 5), 1e-4)
    at_0_7 = make_schedule(flow.scheduler, SamplerOptions(5, 0.7, "flow_sde", 4))
    assert trainer.parts.schedule.stds == at_0_7.stds
    assert (trainer.plan.scored_steps(), config.advantage_name, config.advantage_limit) == ([0, 1, 2, 3], "normalize", 5.0)
    published = RLRConfig(output_dir="x", use_cpu=True, estimator="mixgrpo", sample_num_steps=25)
    assert published.noise_windows == [(start, start + 3) for start in range(22)]
    assert (published.noise_window_rollouts, published.noise_window_stride, published.kl_coef) == (25, 1, None)
    own = RLRConfig(output_dir="x", use_cpu=True, estimator="mixgrpo", noise_window="random", sample_num_steps=10)
    assert own.noise_windows == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("estimator", ["flow_grpo", "mixgrpo"])
def test_presets_of_flow_models_elsewhere(make_trainer, estimator):
    with pytest.raises(
        ValueError, match=r"sampler='flow_sde' does not fit the pipeline's \w+; set sampler to one that does: ddim, ddpm"
    ):
        make_trainer(estimator=estimator)
    assert make_trainer(estimator=estimator, sampler="ddim").plan.scored_steps() == ([0, 1, 2] if estimator == "flow_grpo" else [0])


def test_every_window_is_checked_before_the_run(make_trainer):
    """The last step of Flow-CPS adds no noise, which the last of the windows would need."""
    options = {"estimator": "ddpo", "noise_steps": 1, "silent_estimator": "none", "noise_window": "progressive"}
    options["sd_pipeline"] = digits.load_pipeline("digits-flow")
    with pytest.raises(ValueError, match=r"noise_steps=\(3, 3\): sampler 'flow_cps' adds no noise in these steps"):
        make_trainer(**options)
    make_trainer(**options, noise_window_range=[0, 2])
    with pytest.raises(PlanError, match=r"noise_window='random', noise in steps 1 to 1: step 0 of 4 adds no noise"):
        make_trainer(estimator="draft", fo_steps=3, rest_estimator="lr", noise_steps=1, noise_window="random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "awm", "kl_coef": 0.1}, "kl_coef=0.1 with estimator='awm': its chain has no density"),
        ({"estimator": "nft", "recompute": "graph"}, "recompute='graph' with estimator='nft': it has no chain"),
        ({"estimator": "nft", "clip_range": 0.1}, "clip_range=0.1 with estimator='nft': it has no ratio to clip"),
        (
            {"estimator": "nft", "advantage": "leave_one_out"},
            "advantage='leave_one_out' with estimator='nft': rewards become probabilities",
        ),
        ({"estimator": "awm", "fo_steps": 2}, "fo_steps=2: has no effect with estimator='awm'"),
        ({"estimator": "rlr", "forward_times": 2}, "forward_times=2: is of losses on the forward process"),
    ],
)
def test_losses_on_the_forward_process_refuse_what_they_would_ignore(options, message):
    with pytest.raises(ValueError, match=message):
        RLRConfig(output_dir="x", use_cpu=True, **options)


def test_losses_on_the_forward_process_sample_without_noise_unless_told(make_trainer):
    trainer = make_trainer(estimator="awm")
    assert not any(trainer.parts.schedule.stds) and trainer.args.clip_range == 1
    assert trainer.parts.old_policy is None  # one update per rollout: the present policy is the one that sampled
    noisy = make_trainer(estimator="nft", sampler="ddim", old_policy_decay="0,0.5,0.5")
    assert all(noisy.parts.schedule.stds) and noisy.args.clip_range is None
    assert noisy.parts.old_policy.decay == (0, 0.5, 0.5)
    with pytest.raises(ValueError, match="diagnose with estimator='awm'"):
        trainer.diagnose()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits", "digits-flow"])
@pytest.mark.parametrize("estimator", ["awm", "nft"])
def test_losses_on_the_forward_process_raise_the_reward(make_trainer, seven, model, estimator):
    """A seed of the benchmark takes 10 updates from 0.1 to more than 0.45 on digits, to more than 0.4 on digits-flow."""
    trainer = make_trainer(
        estimator=estimator, sd_pipeline=digits.load_pipeline(model), sample_num_steps=10, per_device_train_batch_size=32, lora_r=4,
        learning_rate=1e-2, lr_scheduler_type="constant", max_steps=10, forward_times=4, log_estimator_norms=False,
    )  # fmt: skip
    prompts = [digits.PROMPT] * 64
    before = float(seven(trainer.generate(prompts), prompts, [{}] * 64).mean())
    trainer.train()
    after = float(seven(trainer.generate(prompts), prompts, [{}] * 64).mean())
    assert before < 0.2
    assert after > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_window": "moving"}, "noise_window='moving': must be one of fixed, random, progressive"),
        ({"noise_window": "random"}, r"noise_steps=None with noise_window='random': must be the length .* between 1 and 4"),
        ({"noise_window": "random", "noise_steps": [1, 2]}, r"noise_steps=\[1, 2\] with noise_window='random'"),
        ({"noise_window": "progressive", "noise_steps": 5}, "noise_steps=5 with noise_window='progressive'"),
        ({"noise_steps": 2, "noise_window_range": [0, 2]}, "with noise_window='fixed': has no effect.*'random' or 'progressive'"),
        (
            {"noise_steps": 2, "noise_window": "random", "noise_window_stride": 2},
            "noise_window_stride=2 with noise_window='random': has no effect",
        ),
        (
            {"noise_steps": 3, "noise_window": "random", "noise_window_range": [1, 2]},
            r"noise_window_range=\[1, 2\]: .* between 0 and 3, .* room for a window of noise_steps=3",
        ),
        ({"noise_steps": 1, "noise_window": "random", "noise_window_range": [2, 4]}, r"noise_window_range=\[2, 4\]"),
        ({"noise_window": "progressive", "noise_steps": 1, "noise_window_rollouts": 0}, "noise_window_rollouts=0"),
        ({"fo_steps": 5}, r"fo_steps=5: K must lie between 0 and the number of steps, 4"),
        ({"fo_steps": 2, "ho_length": 3}, "ho_length=3"),
        ({"fo_steps": 1, "ho_length": 1, "ho_start": [2, 3]}, "ho_start"),
        ({"estimator": "ppo"}, "estimator='ppo': unknown; choose one of rlr"),
        ({"ho_start": "grad_norm", "log_estimator_norms": False}, "ho_start='grad_norm' with log_estimator_norms=False"),
        ({"advantage": "best"}, "advantage='best': must be one of"),
        ({"output_dir": ""}, "output_dir='': must be a folder; leave it out"),
        ({"recompute": "twice"}, "recompute='twice'"),
        ({"sample_num_steps": 0}, "sample_num_steps=0"),
        ({"prompt_scales": [3, 2]}, r"prompt_scales=\[3, 2\]: must be increasing"),
        ({"prompt_scales": [4]}, r"prompt_scales=\[4\]"),
        ({"clip_range": -1.0}, "clip_range=-1.0"),
        ({"num_images_per_prompt": 3}, "num_images_per_prompt=3: must divide"),
        ({"per_device_train_batch_size": 3, "sample_batch_size": 4}, "must be a multiple of"),
        ({"estimator": "es", "zo_num_perturbations": 3}, "zo_num_perturbations=3"),
        ({"sample_num_steps": 5000}, "sample_num_steps=5000: must lie between 1 and the scheduler's 1000"),
    ],
)
def test_options_outside_the_chain(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


@pytest.mark.medium
def test_output_folder_of_another_run(make_trainer, pipeline, seven, caplog):
    for _ in range(2):
        trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=1, overwrite=True)
        trainer.train()
    lines = [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1]
    with pytest.raises(ValueError, match=r"holds another run \(metrics.jsonl\).*--overwrite"):
        make_trainer(sd_pipeline=copy.deepcopy(pipeline)).train()
    # a folder that nobody asked for by name is no reason to refuse: the second trainer of a script takes another one
    config = RLRConfig(use_cpu=True, sample_num_steps=2, sample_guidance_scale=1.0, max_steps=1, num_log_images=0)
    folders = []
    for _ in range(2):
        trainer = RLRTrainer(config, seven, *PROMPTS, copy.deepcopy(pipeline))
        trainer.train()
        folders.append(trainer.args.output_dir)
    assert folders == ["rlr-output", "rlr-output-2"] and config.output_dir == "rlr-output"
    assert "rlr-output holds another run (checkpoint-1, metrics.jsonl): this one goes to rlr-output-2" in caplog.text


def test_lora_dropout_is_refused(make_trainer):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="lora_dropout=0.1: must be 0"):
        make_trainer(peft_config=LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.1))


def test_fp16_needs_an_accelerator(make_trainer):
    with pytest.raises(ValueError, match="fp16=True on a CPU: needs an accelerator; leave fp16 unset, or set bf16=True"):
        make_trainer(fp16=True)


@pytest.mark.medium
def test_auto_chooses_before_the_first_update_and_keeps_it(make_trainer, pipeline, monkeypatch, caplog):
    options = {"fo_steps": "auto", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    monkeypatch.setattr(running, "_measured", lambda trainer, name: ({name: 3}, "for a test"))
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    trainer.train()
    assert trainer.plan.fo_steps == 3
    assert trainer.args.fo_steps == "auto"
    assert "fo_steps='auto': chose fo_steps = 3 of 4 steps" in caplog.text
    resumed = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    monkeypatch.setattr(running, "_measured", lambda *arguments: pytest.fail("chose anew"))
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-1"))
    assert resumed.plan == trainer.plan


@pytest.mark.medium
def test_a_noise_window_is_chosen_with_k_and_lasts(make_trainer, pipeline, monkeypatch, caplog):
    options = {"noise_steps": "auto", "fo_steps": "auto", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    seen = []

    def measured(trainer, name):
        seen.append((name, trainer.parts.schedule.stds))
        return {"noise_steps": 2, "fo_steps": 2}, "for a test"

    monkeypatch.setattr(running, "_measured", measured)
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    trainer.train()
    ((name, stds),) = seen  # K is not asked for again
    assert name == "noise_steps"
    assert all(stds)  # every step of the measured chain has noise
    for sampler in (trainer.parts.sampler, trainer.parts.evaluator.sampler):
        assert sampler.schedule.stds == (*stds[:2], 0.0, 0.0)
    assert trainer.plan.fo_steps == 2
    assert "noise_steps='auto': chose noise_steps = 2, fo_steps = 2 of 4 steps, for a test" in caplog.text
    output = Path(trainer.args.output_dir)
    assert json.loads((output / "run.json").read_text())["chosen"]["noise_steps"] == {"value": 2, "reason": "for a test"}
    assert json.loads((output / "checkpoint-1" / "rlr_config.json").read_text())["noise_steps"] == 2  # for `rlr-trainer sample`
    resumed = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    monkeypatch.setattr(running, "_measured", lambda *arguments: pytest.fail("chose anew"))
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-1"))
    assert resumed.plan == trainer.plan
    assert resumed.parts.sampler.schedule.stds == trainer.parts.sampler.schedule.stds
    monkeypatch.setattr(running, "_measured", measured)
    trainer.train()  # anew: measured anew, on a chain with noise in all steps
    assert seen[1] == seen[0]


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "es"},
        {"ho_length": 2},
        {"control_variate": True},
        {"rest_num_steps": 1},
        {"silent_estimator": "ho"},
        {"estimator": "draft"},
    ],
)
def test_windows_are_measured_for_plans_that_have_one(options):
    with pytest.raises(PlanError, match="noise_steps='auto' with estimator=.*give a number"):
        RLRConfig(use_cpu=True, noise_steps="auto", **options)


def test_auto_sub_chain_length_needs_a_budget():
    for options in ({"ho_length": "auto"}, {"memory_budget_gb": 1.0}):
        with pytest.raises(ValueError, match="formula \\(8\\) needs both"):
            RLRConfig(use_cpu=True, **options)


@pytest.mark.medium
def test_another_training_begins_with_no_measurements(make_trainer):
    """What the last update of the first one took down, which was not logged, does not belong to the second one's first line."""
    trainer = make_trainer(sample_num_steps=1, max_steps=3, logging_steps=2)
    trainer.train()
    trainer.parts.metrics.add({"of the first": 1.0})
    trainer.train()
    (line,) = [row for row in trainer.state.log_history if "loss" in row]
    assert line["step"] == 2
    assert "of the first" not in line


def test_nothing_is_reported_to_anybody(make_trainer, monkeypatch):
    """TRL's base sends telemetry of every trainer that is made."""
    base = pytest.importorskip("trl.trainer.base_trainer")
    if not hasattr(base, "send_telemetry"):
        pytest.skip("this TRL sends none")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base, "send_telemetry", lambda *arguments, **keywords: pytest.fail("sent telemetry"))
    make_trainer()


def test_generate_takes_texts_and_texts_of_scales():
    rows = running.prompt_rows(["one", ("coarse", "fine")], ["dark", "light"])
    assert rows == [PromptRow("one", {}, "dark"), PromptRow("fine", {}, "light", ("coarse", "fine"))]
    assert running.prompt_rows(["one"], None) == [PromptRow("one", {})]
