"""Wan 2.1 and 2.2 on tiny pipelines of the real classes: one denoiser, two, and a time per token."""

from __future__ import annotations

import functools

import pytest
import torch
from families.conformance import CONFORMANCE, FAST
from families.short_prompts import SHORT, TOKENS
from families.tiny.wan import SIZE, make_pipeline

from rlr_trainer import RLRConfig, RLRTrainer
from rlr_trainer.pipelines import adapt, attach_lora, load_pipeline
from rlr_trainer.pipelines.wan import WanAdapter
from rlr_trainer.testing import check_adapter
from rlr_trainer.testing.runs import greenness

BOUNDARY = 0.8  # of four steps at shift 3, at times 1000, 900, 750 and 500, two come before it
SMALLER = {"rlr": {"max_steps": 8}}  # a shorter training
make_pair = functools.partial(make_pipeline, boundary_ratio=BOUNDARY)


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    check_adapter(make_pipeline, checks=[check], options=SMALLER.get(check), **SIZE, **SHORT)


PAIR = [check for check in FAST if check not in ("prompts", "layout")]


@pytest.mark.parametrize("check", [*PAIR, pytest.param("whole_network", marks=pytest.mark.slow)])
@pytest.mark.medium
def test_two_denoisers_conform(check):
    check_adapter(make_pair, checks=[check], **SIZE, **SHORT)


@pytest.mark.medium
def test_the_second_denoiser_has_a_guidance_of_its_own():
    def make_adapter(pipeline):
        adapter = SHORT["make_adapter"](pipeline)
        adapter.guidance_scale_2 = 1.5
        return adapter

    call = {**SHORT["call_arguments"], "guidance_scale_2": 1.5}
    check_adapter(make_pair, make_adapter=make_adapter, checks=["generation"], call_arguments=call, **SIZE)


@pytest.mark.medium
def test_a_time_per_token_generates_as_its_pipeline():
    check_adapter(functools.partial(make_pipeline, expand_timesteps=True), checks=["generation"], **SIZE, **SHORT)


def adapt_one(name, pipeline):
    """The adapter of a pipeline with two denoisers, of which one is trained."""
    adapter = WanAdapter(pipeline, train=(name,))
    adapter.max_sequence_length = TOKENS
    return adapter


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
@pytest.mark.medium
def test_one_of_two_denoisers_is_trained(name, tmp_path):
    """By steps of both; those of the frozen one alone have no graph but for the idle one's."""
    pipeline = make_pair()
    other = pipeline.transformer if name == "transformer_2" else pipeline.transformer_2
    before = {key: p.detach().clone() for key, p in other.named_parameters()}
    config = RLRConfig(
        str(tmp_path), estimator="ddpo", silent_estimator="none", sample_num_steps=4, per_device_train_batch_size=2, max_steps=1,
        num_log_images=0, use_cpu=True, disable_tqdm=True, save_strategy="no", sample_guidance_scale=1.0, **SIZE,
    )  # fmt: skip
    trainer = RLRTrainer(config, greenness, lambda: ("a seven", {}), adapt_one(name, pipeline))
    trainer.train()
    params = trainer.parts.policy.trainable_parameters()
    assert all(key.startswith(f"denoiser.{name}.") for key in params)
    assert any(p.any() for key, p in params.items() if "lora_B" in key)
    assert all(torch.equal(before[key], p) for key, p in other.named_parameters())


@pytest.mark.parametrize("check", ["gradients", "lora"])
@pytest.mark.medium
def test_the_first_of_two_denoisers_alone_conforms(check):
    options = {"make_adapter": functools.partial(adapt_one, "transformer"), "call_arguments": SHORT["call_arguments"]}
    check_adapter(make_pair, checks=[check], **SIZE, **options)


def test_lora_weights_of_both_denoisers_are_continued(tmp_path):
    from peft import LoraConfig

    pipeline = make_pair()
    pipeline.save_pretrained(tmp_path)
    adapter = adapt(pipeline)
    adapter.attach_lora(LoraConfig(r=2, target_modules=list(adapter.lora_targets), init_lora_weights=False), seed=0)
    adapter.save_lora(tmp_path)
    again = adapt(load_pipeline(tmp_path))
    assert again.attach_lora(None, seed=1)
    ours, theirs = ([p for p in a.denoiser.parameters() if p.requires_grad] for a in (adapter, again))
    assert len(ours) == 40
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    lines = adapter.lora_snippet("'weights'").splitlines()
    assert lines[1] == (
        "pipe.load_lora_weights('weights', weight_name='pytorch_lora_weights_2.safetensors', load_into_transformer_2=True)"
    )


def test_lora_weights_of_the_frozen_denoiser_belong_to_the_reference():
    """A distillation of one denoiser stays on, where the trained one's weights are switched off."""
    from peft import LoraConfig

    from rlr_trainer.pipelines import Policy
    from rlr_trainer.pipelines.reference import ReferencePolicy

    pipeline = make_pair()
    distilled = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    attach_lora(pipeline.transformer_2, distilled, seed=0)
    adapter = adapt_one("transformer", pipeline)
    adapter.attach_lora(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), seed=0)
    policy = Policy(adapter.denoiser)
    reference = ReferencePolicy(
        policy, True, torch.device("cpu"), torch.float32, functools.partial(torch.autocast, "cpu", enabled=False)
    )
    with reference._without_lora():
        off = {name: pipeline.components[name].blocks[0].attn1.to_q.disable_adapters for name in ("transformer", "transformer_2")}
    assert off == {"transformer": True, "transformer_2": False}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((24, 16), "height=24: must be a positive multiple of 16, .*; the nearest are 16 and 32"),
        ((16, 16, 4), "num_frames=4: must be 1 plus a multiple of 2, because the VAE .*; the nearest are 3 and 5"),
        ((16, 16, -3), "num_frames=-3: .*; the nearest is 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline()).layout(*size)


def test_a_pipeline_that_lacks_a_denoiser_is_refused():
    pipeline = make_pair()
    pipeline.transformer_2 = None
    with pytest.raises(ValueError, match="transformer_2=None: with boundary_ratio=0.8 the steps use transformer and transformer_2"):
        adapt(pipeline)


@pytest.mark.parametrize(("make", "train"), [(make_pair, ["transformer_3"]), (make_pair, []), (make_pipeline, ["transformer_2"])])
def test_an_unknown_denoiser_is_refused(make, train):
    with pytest.raises(ValueError, match="must name some of"):
        WanAdapter(make(), train=train)


@pytest.mark.parametrize(
    ("options", "message"), [({"in_channels": 8}, "8 channels.*text-to-video"), ({"image_dim": 8}, "image_dim=8")]
)
def test_a_model_that_takes_pictures_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline(**options))


@pytest.mark.parametrize("late", [False, True])
def test_a_call_of_one_denoiser_has_a_gradient_for_every_trained_weight(late):
    """Of the idle one zeros, so that processes which average gradients wait for none, and a step of the frozen one has a graph."""
    pair = adapt(make_pair()).denoiser
    inputs = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.randn(1, 5, 16)}
    pair(torch.randn(1, 4, 2, 4, 4), late=late, return_dict=False, **inputs)[0].square().sum().backward()
    sizes = {name: [p.grad.abs().sum().item() for p in getattr(pair, name).parameters()] for name in pair.names}
    assert not any(sizes["transformer" if late else "transformer_2"])
    assert any(sizes["transformer_2" if late else "transformer"])
