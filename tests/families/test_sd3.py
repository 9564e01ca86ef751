"""Stable Diffusion 3 and 3.5 on tiny pipelines of the real classes."""

from __future__ import annotations

import functools

import pytest
from families.conformance import WITH_DDPO
from families.short_prompts import SHORT
from families.tiny.sd3 import make_pipeline

from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter


@pytest.mark.parametrize("check", WITH_DDPO)
def test_it_conforms(check):
    # With flow_cps the scheduler's last but one step leads to a sigma of 0.009, and adds so little noise that likelihood ratios there
    # are mostly variance.
    check_adapter(make_pipeline, checks=[check], options={"sampler": "flow_sde"}, learning_rate=3e-2, **SHORT)


@pytest.mark.parametrize("options", [{}, {"t5": False}, {"dynamic_shifting": True}])
@pytest.mark.medium
def test_every_variant_generates_as_its_pipeline(options):
    check_adapter(functools.partial(make_pipeline, **options), checks=["generation"])


def test_it_shifts_timesteps_by_the_number_of_patches_only_where_the_scheduler_does():
    fixed, dynamic = adapt(make_pipeline()), adapt(make_pipeline(dynamic_shifting=True))
    assert fixed.timestep_arguments(fixed.layout(16, 16), 4) == {}
    small, large = (dynamic.timestep_arguments(dynamic.layout(*size), 4)["mu"] for size in ((16, 16), (48, 48)))
    # on the line through the scheduler's base_shift at 256 patches and its max_shift at 4096
    slope = (1.15 - 0.5) / (4096 - 256)
    assert small == pytest.approx(0.5 + slope * (16 - 256))
    assert large == pytest.approx(0.5 + slope * (144 - 256))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((18, 16), "height=18: must be a positive multiple of 4"),
        ((16, 0), "width=0: must be a positive multiple of 4"),
        ((16, 64), "width=64: the transformer has positions for 48 pixels at most"),
        ((16, 16, 5), "num_frames=5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline()).layout(*size)


def test_an_inpainting_transformer_is_refused():
    pipeline = make_pipeline()
    pipeline.transformer.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels but the VAE makes 4"):
        adapt(pipeline)


def test_a_pipeline_without_a_clip_encoder_is_refused():
    pipeline = make_pipeline()
    pipeline.text_encoder_2 = None
    with pytest.raises(ValueError, match="text_encoder_2=None"):
        adapt(pipeline)
