"""Flux.1 dev and schnell on tiny pipelines of the real classes."""

from __future__ import annotations

import functools
import logging

import pytest
from families.conformance import CONFORMANCE
from families.short_prompts import SHORT
from families.tiny.flux import make_pipeline

from rlr_trainer.pipelines import adapt, flux
from rlr_trainer.testing import check_adapter

make_schnell = functools.partial(make_pipeline, schnell=True)


@pytest.mark.parametrize("check", CONFORMANCE)
def test_dev_conforms(check):
    check_adapter(make_pipeline, height=16, width=16, checks=[check], **SHORT)


@pytest.mark.parametrize("make", [make_pipeline, make_schnell], ids=["dev", "schnell"])
@pytest.mark.medium
def test_each_generates_as_its_pipeline(make):
    check_adapter(make, height=16, width=16, checks=["generation"])


def test_a_guidance_scale_without_effect_is_named(caplog):
    flux._warn_of_unused_guidance.cache_clear()
    adapter = adapt(make_schnell())
    with caplog.at_level(logging.WARNING, logger="rlr_trainer"):
        adapter.batch_inputs(adapter.layout(16, 16), 1.0)
        assert not caplog.messages
        adapter.batch_inputs(adapter.layout(16, 16), 3.5)
    assert "sample_guidance_scale has no effect" in caplog.text


def test_the_usual_size_is_the_pipelines():
    pipeline = make_pipeline()
    pipeline.default_sample_size = 128  # of every FluxPipeline
    layout = adapt(pipeline).layout(None, None)
    assert (layout.height, layout.width, layout.shape) == (256, 256, (64 * 64, 16))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((18, 16), "height=18: must be a positive multiple of 4, twice the VAE's scale factor 2"),
        ((16, -4), "width=-4: must be a positive multiple of 4"),
        ((16, 16, 5), "num_frames=5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline()).layout(*size)


def test_an_inpainting_or_control_transformer_is_refused():
    pipeline = make_pipeline()
    pipeline.transformer.register_to_config(in_channels=32)
    with pytest.raises(ValueError, match="takes 32 channels but packed latents have 16"):
        adapt(pipeline)


def test_a_pipeline_without_a_text_encoder_is_refused():
    pipeline = make_pipeline()
    pipeline.text_encoder_2 = None
    with pytest.raises(ValueError, match="text_encoder_2=None"):
        adapt(pipeline)
