"""Stable Diffusion XL: the base model, SDXL-Turbo, LCM-SDXL, and what is refused."""

import functools

import pytest
import torch
from families.conformance import CONFORMANCE
from families.schedulers import with_scheduler
from families.tiny.sdxl import make_pipeline

from rlr_trainer.pipelines import PromptCache, adapt
from rlr_trainer.testing import check_adapter

LEADING = with_scheduler(make_pipeline, "EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1)
TURBO = with_scheduler(make_pipeline, "EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
LCM = with_scheduler(functools.partial(make_pipeline, time_cond_proj_dim=8), "LCMScheduler")
SCALES = {"latents_mean": [0.1, 0.2, 0.3, -0.4], "latents_std": [0.5, 1.5, 1.2, 0.9]}


def without_first_encoder():
    pipeline = make_pipeline(cross_attention_dim=16)
    pipeline.text_encoder = pipeline.tokenizer = None
    return pipeline


def without_zeros():
    pipeline = make_pipeline()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    return pipeline


@pytest.mark.parametrize("check", CONFORMANCE)
@pytest.mark.medium
def test_the_adapter_conforms(check):
    # likelihood ratios are noisy on these random weights: the kit's own number of pictures hardly tells a rise from noise
    more = {"per_device_train_batch_size": 64} if check == "rlr" else None
    check_adapter(make_pipeline, checks=[check], options=more)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(LEADING, {}, id="steps of the base model"),
        pytest.param(TURBO, {"guidance_scale": 0.0}, id="turbo"),
        pytest.param(LCM, {"guidance_scale": 8.0}, id="guidance as an input"),
        pytest.param(functools.partial(make_pipeline, vae=SCALES), {}, id="VAE with a scale per channel"),
        pytest.param(without_first_encoder, {}, id="second text encoder alone"),
        pytest.param(without_zeros, {}, id="no negative prompt is an encoded one"),
    ],
)
@pytest.mark.medium
def test_other_models_of_the_family_generate_as_their_pipeline_does(make, options):
    check_adapter(make, checks=["generation"], **options)


@pytest.mark.parametrize("check", ["generation", "gradients"])
def test_one_step_of_turbo(check):
    """It adds no noise, so it has no likelihood ratio, but first order covers it."""
    check_adapter(TURBO, checks=[check], num_steps=1, guidance_scale=0.0)


def test_only_negative_prompts_that_are_empty_are_zero():
    adapter = adapt(make_pipeline())
    conditioning = adapter.encode(["", "a cat"], ["", "ugly"], 5.0, adapter.layout(None, None), PromptCache())
    ugly, empty = adapter.encode_prompts(["ugly"]), adapter.encode_prompts([""])
    for name, negative in conditioning.negative.items():
        assert not negative[0].any()
        torch.testing.assert_close(negative[1:], ugly[name])
        torch.testing.assert_close(conditioning.positive[name][:1], empty[name])


def test_a_unet_of_stable_diffusion_is_refused():
    pipeline = make_pipeline()
    pipeline.unet.register_to_config(addition_embed_type=None)
    with pytest.raises(ValueError, match=r"addition_embed_type=None.*must be one of \('text_time',\)"):
        adapt(pipeline)


def test_the_refiner_is_refused():
    with pytest.raises(ValueError, match="The refiner, which takes an aesthetic score"):
        adapt(make_pipeline(projection_class_embeddings_input_dim=5 * 8 + 16))


def test_without_the_second_text_encoder():
    pipeline = make_pipeline()
    pipeline.text_encoder_2 = None
    with pytest.raises(ValueError, match="text_encoder_2 is None"):
        adapt(pipeline)
