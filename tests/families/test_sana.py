"""Sana on a tiny pipeline of the real classes: prompts after an instruction, negative prompts without."""

import pytest
from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaSprintPipeline
from families.chains import assert_on_the_grid_of_its_scheduler, assert_solved_alike
from families.conformance import CONFORMANCE
from families.tiny.sana import FLOW, make_pipeline, make_sprint

from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter

AS_ASKED = {"use_resolution_binning": False}


CHECKS = [check for check in CONFORMANCE if check != "layout"]


@pytest.mark.parametrize("check", CHECKS)
def test_it_conforms(check):
    check_adapter(make_pipeline, checks=[check], call_arguments=AS_ASKED)


def test_the_layout_is_what_the_call_samples():
    """By default at the size that the model was made for; the call knows it of an autoencoder with a factor of 32 alone."""
    check_adapter(lambda: make_pipeline(levels=6, sample_size=16), checks=["layout"])


@pytest.mark.medium
def test_the_time_is_scaled_as_the_transformer_says():
    check_adapter(lambda: make_pipeline(timestep_scale=0.1), checks=["generation"], call_arguments=AS_ASKED)


def test_pictures_equal_those_of_the_released_solver_at_first_order():
    assert_solved_alike(make_pipeline(DPMSolverMultistepScheduler(solver_order=1, **FLOW)), height=32, width=32, **AS_ASKED)


def test_the_released_solver_becomes_flow_cps_on_its_grid(caplog):
    assert_on_the_grid_of_its_scheduler(adapt(make_pipeline()))
    assert "flow_cps stands in for DPMSolverMultistepScheduler" in caplog.text


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((48, 32), "height=48: must be a positive multiple of 32"),
        ((32, 0), "width=0: must be a positive multiple of 32"),
        ((32, 32, 4), "num_frames=4: SanaPipeline makes pictures"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline()).layout(*size)


@pytest.mark.parametrize(("make", "other"), [(make_pipeline, SanaSprintPipeline), (make_sprint, SanaPipeline)])
def test_a_transformer_of_the_other_pipeline_is_refused(make, other):
    with pytest.raises(
        ValueError, match=f"guidance_embeds=.*, which {other.__name__} does not feed; load it as a {type(make()).__name__}"
    ):
        adapt(other(**make().components))


def test_a_model_with_other_channels_is_refused():
    pipeline = make_pipeline()
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, in_channels=8)
    with pytest.raises(ValueError, match="takes 8 channels but the VAE makes 4: an image-conditioned model"):
        adapt(pipeline)


def test_a_pipeline_without_text_encoder_is_refused():
    pipeline = make_pipeline()
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match="text_encoder=None: prompts cannot be encoded"):
        adapt(pipeline)
