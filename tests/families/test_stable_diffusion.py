"""Stable Diffusion 1.x and 2.x: v-prediction, latent consistency models, and what is refused. tests/testing checks the plain model."""

import functools

import pytest
from families.conformance import FAST
from families.schedulers import with_scheduler
from families.tiny import lcm
from families.tiny.stable_diffusion import make_pipeline

from rlr_trainer.pipelines import PromptCache, adapt
from rlr_trainer.testing import check_adapter


@pytest.mark.parametrize("check", FAST)
@pytest.mark.medium
def test_a_model_that_predicts_v_conforms(check):
    check_adapter(with_scheduler(make_pipeline, "DDIMScheduler", prediction_type="v_prediction"), checks=[check])


@pytest.mark.parametrize("check", ["generation", "prompts", "ratio", "gradients"])
def test_a_latent_consistency_model_conforms(check):
    """Its UNet takes the guidance scale as an input."""
    check_adapter(lcm.make_pipeline, guidance_scale=8.0, checks=[check])


@pytest.mark.parametrize(
    ("make", "guidance_scale"),
    [
        pytest.param(functools.partial(lcm.make_pipeline, pipeline_class="LatentConsistencyModelPipeline"), 8.0, id="its own pipeline"),
        pytest.param(functools.partial(lcm.make_pipeline, distilled=False), 1.5, id="LCM-LoRA"),
    ],
)  # fmt: skip
@pytest.mark.medium
def test_other_latent_consistency_models_generate_as_their_pipeline_does(make, guidance_scale):
    check_adapter(make, guidance_scale=guidance_scale, checks=["generation"])


@pytest.mark.parametrize(
    ("make", "guided"),
    [(make_pipeline, {0.0: False, 1.0: False, 1.5: True}), (lcm.make_pipeline, {0.0: False, 1.0: False, 8.0: False})],
    ids=["two branches", "guidance as an input"],
)
def test_a_second_branch_where_guidance_needs_one(make, guided):
    adapter = adapt(make())
    layout = adapter.layout(None, None)
    found = {scale: adapter.encode(["a"], [""], scale, layout, PromptCache()).negative is not None for scale in guided}
    assert found == guided


def test_guidance_that_the_network_takes_as_an_input_is_not_rescaled():
    assert adapt(make_pipeline()).rescales_guidance
    assert not adapt(lcm.make_pipeline()).rescales_guidance


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 9}, "takes 9 channels but the VAE makes 4: an inpainting"),
        ({"class_embed_type": "projection"}, "class_embed_type='projection'"),
        ({"num_class_embeds": 3}, "num_class_embeds=3"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, r"encoder_hid_dim_type='ip_image_proj'.*unload_ip_adapter"),
        ({"addition_embed_type": "text_time"}, r"addition_embed_type='text_time'.*must be one of \(None, 'text'\)"),
    ],
)
def test_a_unet_with_inputs_that_are_not_fed(config, message):
    pipeline = make_pipeline()
    pipeline.unet.register_to_config(**config)
    with pytest.raises(ValueError, match=message):
        adapt(pipeline)
