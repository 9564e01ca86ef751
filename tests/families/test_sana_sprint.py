"""Sana-Sprint on a tiny pipeline of the real classes: a consistency model of one to four steps, with guidance as an input."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from families.chains import solve
from families.conformance import CONFORMANCE
from families.tiny.sana import make_sprint

from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter

AS_ASKED = {"use_resolution_binning": False}
EVENLY = AS_ASKED | {"intermediate_timesteps": None}  # which the pipeline's call has for two steps alone
CHECKS = [check for check in CONFORMANCE if check != "layout"]  # that of Sana, see its test


@pytest.mark.parametrize("check", CHECKS)
def test_it_conforms(check):
    check_adapter(make_sprint, checks=[check], num_steps=2, call_arguments=AS_ASKED)


@pytest.mark.medium
def test_it_takes_more_steps():
    check_adapter(make_sprint, checks=["generation"], num_steps=4, call_arguments=EVENLY)


def test_another_scheduler_is_refused():
    pipeline = make_sprint()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(
        ValueError, match="the scheduler is a FlowMatchEulerDiscreteScheduler, but SanaSprintPipeline .* SCMScheduler"
    ):
        adapt(pipeline)


def test_it_takes_one_step():
    pipeline, prompts, noise = make_sprint(), ["A red  Fox", "a house"], torch.randn(2, 4, 8, 8)
    call = {"num_inference_steps": 1, "output_type": "pt", "height": 32, "width": 32, **EVENLY}
    theirs = pipeline(prompts, guidance_scale=3.0, latents=noise, **call).images
    ours = solve(adapt(pipeline), 1, prompts, ["", ""], 3.0, noise)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
