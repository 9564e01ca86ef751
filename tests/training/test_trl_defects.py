"""One regression test for each defect of TRL 0.23.1's DDPOTrainer and AlignPropTrainer, at this library's place for it.

| defect of TRL 0.23.1                                                      | test                                              |
|---------------------------------------------------------------------------|---------------------------------------------------|
| T1  gradients are never averaged over processes                           | test_distributed.py::test_two_processes_equal_one |
| T2  checkpointing hangs with two processes                                | test_T02                                          |
| T3  resuming LoRA trains a dead adapter                                   | test_T03_T04_T05_T18                              |
| T4  the epoch is taken from the number of the checkpoint                  | test_T03_T04_T05_T18                              |
| T5  saving after resuming: "already exists"                               | test_T03_T04_T05_T18                              |
| T6  the default config crashes in the second epoch                        | test_T06                                          |
| T7  construction fails before accelerate is set up                        | test_T07, parity/test_scripts.py                  |
| T8  an image hook needs a tracker                                         | test_T08                                          |
| T9  async rewards need futures                                            | test_T09                                          |
| T10 save_pretrained and push_to_hub raise                                 | test_T10, persistence/                           |
| T11 a saved LoRA pipeline cannot be loaded                                | test_T11                                          |
| T12 std 0 gives NaN                                                       | test_T12                                          |
| T13 the old log-density is not that of the stored latent                  | test_T13_T14                                      |
| T14 training and sampling with different guidance                         | test_T13_T14                                      |
| T15 integer rewards make integer advantages                               | test_T15                                          |
| T16 one negative prompt for all                                           | rollouts/test_sampler.py                          |
| T17 prompts that differ after 77 tokens, or in case, share statistics     | rollouts/test_collector.py                        |
| T18 resuming resets the step, the prompts and the statistics              | test_T03_T04_T05_T18                              |
| T19 whole trajectories on the GPU, twice                                  | rollouts/test_collector.py                        |
| T20 LoRA weights in the folder are ignored                                | test_T20                                          |
| T21 LoRA rank, targets, scheduler, resolution are hard-coded              | test_T21                                          |
| T22 AlignProp's truncation is drawn anew at every step                    | test_T22                                          |
| T23 AlignProp's defaults fail with fewer than 50 steps                    | test_T23                                          |
| T24 AlignProp: PPO's loss, hooks and saving as above                      | test_T24                                          |
| T25 full fine-tuning in fp16 has fp16 weights                             | test_T25                                          |
| T27 no test called train()                                                | most of this file does                            |
"""

import copy
import json
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from programs import environment, torchrun
from safetensors.torch import load, load_file
from trl_configs import alignprop_config, ddpo_config

from rlr_trainer import PlanError, RLRConfig, RLRTrainer, digits
from rlr_trainer.estimators.advantages import PerPromptStatistics
from rlr_trainer.pipelines import LORA_FILE
from rlr_trainer.training import running

SMALL = {"sample_num_steps": 3, "sample_guidance_scale": 1.0}


pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture
def from_trl(pipeline, seven):
    """A trainer on a TRL config, as a script makes it, on a fresh copy of the bundled model."""

    def make(config, *arguments, reward=seven, prompt=None, **keywords):
        prompt = prompt or (lambda: (digits.PROMPT, {}))
        return RLRTrainer(config, reward, prompt, copy.deepcopy(pipeline), *arguments, **keywords)

    return make


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}


def moved(before, trainer):
    return [name for name, tensor in weights_of(trainer).items() if not torch.equal(before[name], tensor)]


def same_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def log_lines(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


TWO_PROCESSES = """
import sys, torch
from trl_configs import ddpo_config
from rlr_trainer import RLRTrainer, digits
from rlr_trainer.digits.rewards import digit_reward

torch.set_num_threads(1)

def make(epochs, resume_from):
    config = ddpo_config(num_epochs=epochs, sample_num_steps=2, sample_guidance_scale=1.0, sample_num_batches_per_epoch=1,
                         resume_from=resume_from, accelerator_kwargs={"cpu": True}, train_learning_rate=0.01)
    return RLRTrainer(config, digit_reward(7), lambda: (digits.PROMPT, {}), digits.load_pipeline())

make(2, "").train()
resumed = make(3, "logs/checkpoint-2")
resumed.train()
rank = resumed.accelerator.process_index
torch.save({name: p.detach() for name, p in resumed.policy.trainable_parameters().items()}, f"rank{rank}.pt")
"""


@pytest.mark.slow
def test_T02_two_processes_save_and_resume(tmp_path):
    Path("script.py").write_text(TWO_PROCESSES)
    command = torchrun(2, "script.py")
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment())  # TRL's run never ends
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert same_tensors(first, second)
    saved = {path.name for path in Path("logs/checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", LORA_FILE} <= saved  # every process's random numbers, not the first one's alone


@pytest.mark.medium
def test_T06_the_default_config_trains_and_saves(from_trl):
    config = ddpo_config(
        mixed_precision="fp16", num_epochs=3, **SMALL
    )  # TRL's defaults but for size: project_kwargs={}, save_freq=1
    config.accelerator_kwargs = {"cpu": True}
    trainer = from_trl(config)
    start = weights_of(trainer)
    trainer.train()
    assert moved(start, trainer)
    assert sorted(path.name for path in Path("logs").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_T07_construction_needs_no_accelerate_state(from_trl):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    assert from_trl(ddpo_config(**SMALL)).image_samples_hook is None


@pytest.mark.parametrize("log_with", [None, "tensorboard"])
@pytest.mark.medium
def test_T08_image_hooks_work_with_and_without_a_tracker(from_trl, log_with):
    def hook(image_data, global_step, tracker):  # the hook of TRL's example
        images, prompts, _, rewards, _ = image_data[-1]
        named = zip(prompts, rewards, images, strict=True)
        tracker.log_images({f"{p:.25} | {r.item():.2f}": image.unsqueeze(0).float() for p, r, image in named}, step=global_step)

    config = ddpo_config(num_epochs=1, log_with=log_with, sample_num_batches_per_epoch=1, **SMALL)
    from_trl(config, hook).train()
    assert list(Path("logs").rglob("*.png" if log_with is None else "events.out.tfevents*"))


@pytest.mark.medium
def test_T09_async_rewards_take_plain_functions(from_trl, seven):
    threads = set()

    def reward(images, prompts, metadata):
        threads.add(threading.current_thread())
        return seven(images, prompts, metadata), {}

    def run(folder, **options):
        trainer = from_trl(ddpo_config(num_epochs=2, logdir=folder, train_learning_rate=0.01, **SMALL, **options), reward=reward)
        trainer.train()
        return weights_of(trainer)

    in_turn = run("in_turn")
    assert threads == {threading.main_thread()}
    threads.clear()
    together = run("together", async_reward_computation=True, max_workers=2)
    assert threads - {threading.main_thread()}
    assert all(torch.equal(in_turn[name], together[name]) for name in in_turn)


@pytest.mark.medium
def test_T10_weights_and_card_are_saved_and_pushed(from_trl, hub):
    trainer = from_trl(
        ddpo_config(num_epochs=2, push_to_hub=True, logdir="digits-ddpo", save_freq=1, train_learning_rate=0.01, **SMALL)
    )
    trainer.train()
    (push,) = hub.uploads  # the final weights alone
    trainer.save_pretrained("here")
    assert push[0] == "somebody/digits-ddpo"
    assert same_tensors(load(push[1][LORA_FILE]), load_file("here/" + LORA_FILE))
    card = push[1]["README.md"].decode()
    assert "library_name: diffusers" in card and 'load_lora_weights("somebody/digits-ddpo")' in card
    assert not [name for name in push[1] if name.startswith("checkpoint-")]
    trainer.push_to_hub(dataset_name="somebody/prompts")  # as TRL's examples call it
    assert "somebody/prompts" in hub.uploads[1][1]["README.md"].decode()
    trainer.save_model(trainer.args.output_dir)
    assert len(hub.uploads) == 3


@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.medium
def test_T11_what_is_saved_can_be_loaded(make_trainer, pipeline, use_lora):
    from diffusers import StableDiffusionPipeline

    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), use_lora=use_lora, learning_rate=0.01 if use_lora else 1e-4)
    trainer.train()
    trainer.save_pretrained("saved")
    names = [name for path in Path("saved").rglob("*.safetensors") for name in load_file(path)]
    assert names
    assert not [name for name in names if "base_layer" in name]
    assert Path("saved/unet").exists() != use_lora  # LoRA: the weights alone, no half of a pipeline
    if use_lora:
        pipeline.load_lora_weights("saved", weight_name=LORA_FILE)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained("saved")
    inputs = (torch.ones(1, 4, 8, 8), 500, torch.ones(1, 77, pipeline.unet.config.cross_attention_dim))
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(*inputs)[0], trainer.adapter.denoiser(*inputs)[0], rtol=0, atol=1e-5)


def test_T12_a_step_without_noise_is_an_error_that_names_it(from_trl, pipeline, seven):
    from diffusers import DDIMScheduler

    with pytest.raises(PlanError, match="sample_eta=0 with estimator='ddpo'"):
        from_trl(ddpo_config(sample_eta=0.0))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    with pytest.raises(PlanError, match=r"step 2 of 3 adds no noise \(std = 0.0\)"):
        RLRTrainer(ddpo_config(**SMALL), seven, lambda: (digits.PROMPT, {}), pipeline)


@pytest.mark.medium
def test_T13_T14_the_ratio_is_one_before_the_first_update(from_trl):
    """In bf16, at the published eta, where rounding of the stored latents decides everything in TRL; and without guidance (T14)."""
    with pytest.raises(ValueError, match="train_cfg=False with sample_guidance_scale=3"):
        from_trl(ddpo_config(train_cfg=False, sample_guidance_scale=3.0))
    for number, options in enumerate(({"mixed_precision": "bf16"}, {"sample_guidance_scale": 1.0, "train_cfg": False})):
        config = ddpo_config(
            num_epochs=1, sample_num_batches_per_epoch=1, sample_num_steps=3, sample_eta=0.05, logdir=f"run{number}", **options
        )
        config.accelerator_kwargs = {"cpu": True}
        from_trl(config).train()
        (line,) = log_lines(f"run{number}")
        assert (line["ratio/mean"], line["ratio/max_abs_dev"], line["clip_ratio"]) == (1, 0, 0)


def test_T15_integer_rewards_make_real_advantages():
    values = PerPromptStatistics(16, 4).update(["a"] * 4, torch.tensor([1, 2, 3, 5])).values
    torch.testing.assert_close(values, torch.tensor([-1.1832, -0.5071, 0.1690, 1.5213]), rtol=0, atol=1e-4)


@pytest.mark.medium
def test_T03_T04_T05_T18_a_resumed_run_goes_on_where_it_was(from_trl):
    def make(epochs, seen, **options):
        def prompt():
            return digits.class_prompt(int(torch.randint(10, ()))), {}

        def hook(data, step, tracker):
            seen.append(data[0][1])

        config = ddpo_config(
            num_epochs=epochs, per_prompt_stat_tracking=True, sample_num_batches_per_epoch=1, sample_batch_size=2, train_batch_size=2,
            train_learning_rate=0.01, **SMALL, **options,
        )  # fmt: skip
        return from_trl(config, hook, prompt=prompt)

    whole = make(4, prompts := [], logdir="whole")
    whole.train()
    shutil.copytree("whole/checkpoint-2", "resumed/checkpoint-2")
    shutil.copy("whole/metrics.jsonl", "resumed/metrics.jsonl")
    shutil.copytree("whole/checkpoint-3", "resumed/checkpoint-3")  # T05: it is written anew
    resumed = make(4, again := [], logdir="resumed", resume_from="resumed/checkpoint-2")
    assert list(resumed.adapter.denoiser.peft_config) == ["default"]  # T03: TRL adds a second adapter and trains neither
    started = []

    class Started(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            started.append((state.global_step, round(state.epoch)))

    resumed.add_callback(Started)
    resumed.train()
    assert started == [(2, 2), (3, 3)]  # T04
    assert len(prompts) == 4
    assert again == prompts[-2:]
    assert [line["step"] for line in log_lines("resumed")] == [1, 2, 3, 4]
    assert log_lines("resumed")[-1]["reward_queries"] == log_lines("whole")[-1]["reward_queries"]
    assert resumed.statistics.state_dict() == whole.statistics.state_dict()
    assert not moved(weights_of(whole), resumed)
    loaded, last = (load_file(f"resumed/checkpoint-{number}/{LORA_FILE}") for number in (2, 4))
    assert all(not torch.equal(loaded[name], last[name]) for name in loaded)


@pytest.mark.medium
def test_T20_weights_found_in_the_folder_are_trained_on(from_trl, make_trainer, pipeline, seven):
    first = make_trainer(sd_pipeline=copy.deepcopy(pipeline), learning_rate=0.01, lora_r=3)
    first.train()
    pipeline.save_pretrained("folder")
    first.adapter.save_lora("folder")
    second = RLRTrainer(ddpo_config(num_epochs=1, **SMALL), seven, lambda: (digits.PROMPT, {}), "folder")
    assert len(second.adapter.denoiser.peft_config) == 1  # no fresh adapter beside the one that was found
    loaded = sorted(weights_of(second).items())
    for (_, expected), (_, found) in zip(sorted(weights_of(first).items()), loaded, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    start = weights_of(second)
    second.train()
    assert moved(start, second)


@pytest.mark.medium
def test_T21_rank_targets_scheduler_and_resolution_are_options(pipeline, seven):
    from diffusers import EulerDiscreteScheduler

    own = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config,
        beta_schedule="linear",
        beta_end=0.02,
        timestep_spacing="trailing",
        final_sigmas_type="sigma_min",  # with "zero" the last step adds no noise, and DDPO needs some in every step
    )
    pipeline.scheduler = own
    config = RLRConfig.from_ddpo(
        ddpo_config(num_epochs=1, **SMALL), use_cpu=True, lora_r=2, lora_alpha=8, lora_target_modules=["to_q"], height=48, width=24
    )
    shapes = []

    def reward(images, prompts, metadata):
        shapes.append(tuple(images.shape[1:]))
        return seven(images, prompts, metadata)

    trainer = RLRTrainer(config, reward, lambda: (digits.PROMPT, {}), pipeline)
    trainer.train()
    assert {min(p.shape) for p in weights_of(trainer).values()} == {2}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in weights_of(trainer)} == {"to_q"}
    assert trainer.policy.denoiser.peft_config["default"].lora_alpha == 8
    assert set(shapes) == {(3, 48, 24)}
    # The steps are DDIM's, on the noise levels and timesteps of the pipeline's own scheduler, which stays in the pipeline.
    assert trainer.schedule.times == (999, 666, 332)
    levels = torch.linspace(own.config.beta_start, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
    assert trainer.schedule.signal == pytest.approx([float(levels[t]) ** 0.5 for t in (999, 666, 332)], rel=1e-5)
    assert trainer.adapter.pipeline.scheduler is own


@pytest.mark.medium
def test_T22_truncation_is_drawn_once_per_trajectory():
    plan = RLRConfig.from_trl(alignprop_config(sample_num_steps=50), use_cpu=True).plan
    counts = torch.zeros(51)
    generator = torch.Generator().manual_seed(0)
    draws = 5000
    for _ in range(draws):
        steps = plan.draw(1, generator, shared=True).first_order[0]
        counts[int(steps.sum())] += 1
        assert bool(steps.int().diff().ge(0).all())  # a suffix of the chain: no step within it is cut off on its own
    assert counts[0] == 0
    expected = draws / 50  # uniform, where TRL's number of steps is 25 +- 3
    chi_square = float(((counts[1:] - expected) ** 2 / expected).sum())
    assert chi_square < 49 + 5 * (2 * 49) ** 0.5


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_T23_alignprop_defaults_train_with_any_number_of_steps(steps):
    plan = RLRConfig.from_trl(alignprop_config(sample_num_steps=steps), use_cpu=True).plan
    for seed in range(20):
        assert plan.draw(1, torch.Generator().manual_seed(seed), shared=True).first_order.any()


@pytest.mark.medium
def test_T24_alignprop_saves_and_has_no_policy_gradient(from_trl):
    seen = []
    trainer = from_trl(alignprop_config(num_epochs=3, save_freq=2, **SMALL), lambda *data: seen.append(data))
    trainer.train()
    assert sorted(path.name for path in Path("logs").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert [step for _, step, _ in seen] == [1, 2, 3]
    assert trainer.plan.scored_steps() == []
    assert not [name for line in log_lines("logs") for name in line if name.startswith("ratio")]
    assert all(line["grad_norm"] > 0 for line in log_lines("logs"))


@pytest.mark.medium
def test_T25_the_trained_weights_are_float32_in_any_precision(pipeline, seven):
    wrapped = SimpleNamespace(sd_pipeline=pipeline.to(torch.bfloat16), use_lora=False)
    config = ddpo_config(num_epochs=1, mixed_precision="bf16", train_learning_rate=1e-5, **SMALL)
    config.accelerator_kwargs = {"cpu": True}  # transformers has bf16 on a CPU only if it is asked for
    trainer = RLRTrainer(config, seven, lambda: (digits.PROMPT, {}), wrapped)
    assert {p.dtype for p in trainer.adapter.denoiser.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer.adapter.pipeline.text_encoder.parameters()} == {torch.bfloat16}
    start = weights_of(trainer)
    trainer.train()
    assert len(moved(start, trainer)) > 0.9 * len(start)
    assert {p.dtype for p in trainer.adapter.denoiser.parameters()} == {torch.float32}


@pytest.mark.medium
def test_T25_the_first_loss_scale_of_fp16_does_not_skip_updates(from_trl, monkeypatch):
    """fp16 as on a GPU, with the CPU's autocast and scaler. The gradient of the summed log-density overflows at the usual scale of 65536."""
    config = ddpo_config(num_epochs=1, sample_batch_size=2, train_batch_size=2, sample_num_batches_per_epoch=1, **SMALL)
    trainer = from_trl(config, reward=lambda images, *rest: images.mean((1, 2, 3)))
    running.lower_loss_scale(trainer.accelerator.scaler, 4 * 8 * 8)  # nothing to do in float32
    scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scaler
    assert running.Backward(trainer).set_up() == -65536  # where no backward pass sets it up (es)
    running.lower_loss_scale(scaler, 4 * 8 * 8)
    assert scaler.get_scale() == 65536 / (4 * 8 * 8)
    start = weights_of(trainer)
    trainer.train()
    assert not trainer.optimizer.step_was_skipped
    assert moved(start, trainer)
