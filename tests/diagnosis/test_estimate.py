"""The estimate against counts by hooks, and against measured peaks."""

import dataclasses
from pathlib import Path

import pytest
import torch
from families.tiny import flux, sdxl, wan

from rlr_trainer import RLRConfig, RLRTrainer
from rlr_trainer.diagnosis.estimate import Memory, estimate, modules_of
from rlr_trainer.diagnosis.memory import measuring_memory
from rlr_trainer.diagnosis.network_calls import network_calls, stored_latents
from rlr_trainer.diagnosis.shapes import META, counting
from rlr_trainer.diagnosis.sizes import Sizes, candidates
from rlr_trainer.diagnosis.twin import Twin
from rlr_trainer.digits.rewards import digit_reward, ink
from rlr_trainer.estimators.plan import EstimatorPlan

WITHIN = 0.15  # of what was measured

# T = 10: plan -> forward without a graph, with one, backward; decoder and reward forward, backward. As benchmarks/network_calls.py counted
# them by hooks on the bundled model (docs/memory_and_speed.md).
COUNTED = [
    ("draft", {}, {}, (10, 1, 1, 1, 1)),
    ("full_bp", {}, {}, (10, 10, 10, 1, 1)),
    ("ddpo", {}, {"passes": 2}, (5, 10, 10, 0.5, 0)),
    ("rlr", {}, {}, (10, 10, 10, 1, 1)),
    ("rlr", {"rest_num_steps": 2}, {}, (10, 6, 6, 1, 1)),
    ("rlr", {"control_variate": True}, {}, (10, 17, 17, 8, 8)),
    ("rlr_paper", {}, {}, (10, 3, 3, 1, 1)),
    ("sqdf", {}, {}, (10, 19, 19, 11, 11)),
    ("es", {}, {}, (10, 0, 0, 1, 0)),
    ("rlr", {}, {"kl_coef": 0.0}, (20, 10, 10, 1, 1)),
    ("rlr", {}, {"kl_coef": 0.01}, (28, 12, 12, 1, 1)),
    ("draft", {}, {"kl_coef": 0.01}, (30, 10, 10, 1, 1)),
]


@pytest.mark.parametrize(("preset", "options", "how", "expected"), COUNTED)
def test_calls_are_those_that_hooks_count(preset, options, how, expected):
    stds = (0.5,) * 10
    plan = EstimatorPlan.from_preset(preset, 10, **options).on_noise(stds)
    assert dataclasses.astuple(network_calls(plan, stds, **how)) == expected


def test_kept_graphs_save_the_second_forward_pass():
    plan, stds = EstimatorPlan.from_preset("rlr", 10), (0.5,) * 10
    assert dataclasses.astuple(network_calls(plan, stds, keep=True))[:3] == (0, 10, 10)


@pytest.mark.parametrize(
    ("preset", "options", "latents"),
    [("ddpo", {}, 31), ("rlr", {}, 32), ("rlr", {"control_variate": True}, 39), ("es", {}, 31), ("awm", {}, 1)],
)
def test_latents_that_wait_for_the_update(preset, options, latents):
    assert stored_latents(EstimatorPlan.from_preset(preset, 10, **options)) == latents


def test_bytes_and_operations_of_a_product_and_of_attention():
    weight = torch.empty(64, 32, device=META, requires_grad=True)
    x = torch.empty(10, 64, device=META)
    with counting() as meter:
        y = x @ weight
        assert (meter.live(), meter.flops) == (10 * 32 * 4, 2 * 10 * 64 * 32)
        y.sum().backward()
    assert weight.grad is not None and meter.flops == 2 * 2 * 10 * 64 * 32
    query = torch.empty(1, 2, 512, 8, device=META)
    with counting() as meter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert meter.flops == 2 * 2 * 2 * 512 * 512 * 8
    assert meter.peak < 2 * 512 * 512 * 4  # never the matrix of attention weights
    with counting():
        assert bool((query > 0).all()) and query.sum().tolist() == 1.0  # what is read of shapes is 1


def measured_peak(trainer: RLRTrainer, script) -> int:
    """Bytes at the peak of an update, by torch's profiler, beside weights and the optimizer's moments."""
    held = script.make_moments(trainer)
    modules = [m for m in trainer.parts.adapter.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    held += sum(buffer.nbytes for module in modules for buffer in module.buffers())
    if trainer.parts.reference is not None and trainer.parts.reference.copy is not None:
        held += sum(p.nbytes for p in trainer.parts.reference.copy.parameters())
    live = peak = 0
    for event in script.allocations(script.profiled_events(lambda: trainer.train(epochs=1))):
        live += event.nbytes()
        peak = max(peak, live)
    return held + peak


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu_tables

    return gpu_tables


@pytest.mark.parametrize(
    ("batch", "kernel", "options"),
    [
        (1, (3, 3, 3), {}),
        (1, (3, 3, 3), {"padding": 1, "stride": (1, 2, 2)}),
        (1, (1, 1, 1), {}),
        (1, (3, 1, 1), {}),
        (4, (1, 1, 1), {}),
    ],
)
def test_the_workspace_of_convolutions_of_videos_is_that_of_the_cpu(script, batch, kernel, options):
    def peak(work):
        live = most = 0
        for event in script.allocations(script.profiled_events(work)):
            live += event.nbytes()
            most = max(most, live)
        return most

    x, weight = torch.randn(batch, 6, 3, 9, 9, requires_grad=True), torch.randn(8, 6, *kernel)
    convolve = lambda x, weight: torch.nn.functional.conv3d(x, weight, **options)  # noqa: E731
    y = convolve(x, weight)
    measured = peak(lambda: convolve(x, weight)), peak(lambda: torch.autograd.grad(y, x, y.detach()))
    x, weight = (t.to(META).requires_grad_(t.requires_grad) for t in (x.detach().requires_grad_(), weight))
    with counting(on_cpu=True) as forward:
        y = convolve(x, weight)
    with counting(on_cpu=True) as backward:
        torch.autograd.grad(y, x, y.detach())
    assert (forward.peak, backward.peak) == pytest.approx(measured, rel=0.02)  # numbers and small copies aside


def check(trainer, script):
    """The table of docs/estimate.md: python -m pytest tests/diagnosis/test_estimate.py -k peak -s"""
    found = estimate(trainer)
    measured = measured_peak(trainer, script)
    print(f"\nestimated {found.memory.peak:,} bytes, measured {measured:,}: {found.memory.peak / measured - 1:+.1%}")
    assert abs(found.memory.peak / measured - 1) < WITHIN, (found.memory, measured)
    return found


@pytest.mark.medium
def test_a_peak_on_the_bundled_model(make_trainer, script):
    check(make_trainer(reward_function=ink, check_reward=False, per_device_train_batch_size=8), script)


# name of the case -> options, on the bundled model
CASES = {
    "ddpo": {
        "estimator": "ddpo", "sample_guidance_scale": 3.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "sample_batch_size": 8,
    },
    "keep": {"recompute": "keep"},
    "graph": {"estimator": "full_bp", "recompute": "graph", "sample_num_steps": 6},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "sqdf": {"estimator": "sqdf", "sample_num_steps": 3},
    "whole": {"use_lora": False, "kl_coef": 0.01, "ema_decay": 0.9},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peaks_of_other_settings(make_trainer, script, case):
    check(make_trainer(reward_function=digit_reward(7), check_reward=False, **CASES[case]), script)


@pytest.mark.slow
@pytest.mark.parametrize("family", [sdxl, flux, wan], ids=["sdxl", "flux", "wan"])
def test_peaks_of_other_families(make_trainer, script, family):
    options = {"sample_guidance_scale": 3.0, "silent_estimator": "none", "check_reward": False}
    options |= wan.SIZE if family is wan else {}
    check(make_trainer(reward_function=ink, sd_pipeline=family.make_pipeline(), **options), script)


@pytest.mark.medium
def test_a_decoder_of_videos_is_followed_byte_for_byte(make_trainer):
    """By its tensors, as on a device whose convolutions take no workspace."""
    options = {"height": 16, "width": 16, "num_frames": 3, "silent_estimator": "none"}
    trainer = make_trainer(reward_function=ink, sd_pipeline=wan.make_pipeline(), **options)
    latents = torch.randn(2, *trainer.parts.layout.shape).requires_grad_(True)
    with measuring_memory(torch.device("cpu")) as meter:
        videos = trainer.parts.scorer.decode(latents)
        held = meter.held()
        torch.autograd.grad(videos.mean(), latents)
    found = Twin(trainer, None, on_cpu=False).decoding(2, differentiable=True)
    assert (found.held, found.peak) == (held, meter.peak())


def test_the_texts_of_a_batch_are_encoded_together(make_trainer):
    prompts = [{"prompt": text} for text in ("a cat", "a dog", "a cat", "a bird")]
    options = {"train_dataset": prompts, "shuffle_prompts": False, "sample_guidance_scale": 3.0}
    twin = Twin(make_trainer(**options, negative_prompt="a dog"), None, on_cpu=True)
    one = twin.encoding_bytes(1)
    assert one > 0 and twin.encoding_bytes(4) == one * 3 // 2  # three texts, of which the negative one is one, instead of two


@pytest.mark.medium
def test_text_encoders_that_wait_come_to_the_device_for_their_prompts(make_trainer):
    trainer = make_trainer(reward_function=ink, check_reward=False)
    there = estimate(trainer).memory
    trainer.args.offload_text_encoders = True
    apart = estimate(trainer).memory
    assert apart.phases["encoding prompts"] - there.phases["encoding prompts"] == there.parts["text encoders"]
    assert "text encoders" not in apart.parts


def test_candidates_keep_the_samples_of_an_update_and_get_smaller():
    config = RLRConfig(per_device_train_batch_size=8, gradient_accumulation_steps=2, use_cpu=True)
    found = list(candidates(Sizes.of(config)))
    for one in found:
        assert one.per_device_train_batch_size * one.gradient_accumulation_steps == 16
        assert one.sample_batch_size * one.sample_num_batches_per_epoch == 16
        changed = {field: value for field, value in dataclasses.asdict(one).items() if field != "reward_batch_size"}
        RLRConfig(use_cpu=True, reward_batch_size=one.reward_batch_size, **changed)  # it is a configuration that is accepted
    assert found[0].offload_text_encoders and found[0].per_device_train_batch_size == 8
    assert found[-1].per_device_train_batch_size == 1 and found[-1].offload_rollouts and found[-1].gradient_checkpointing


def test_the_peak_is_that_of_the_largest_phase():
    memory = Memory({"network": 10, "optimizer": 2}, {"sampling": 3, "backward pass": 5})
    assert (memory.peak, memory.largest) == (17, "backward pass")


def test_the_networks_of_a_reward_are_found():
    (classifier,) = modules_of(digit_reward(7))
    assert isinstance(classifier, torch.nn.Module)
    assert modules_of(ink) == []
