"""LTX-Video on a tiny pipeline of the real classes."""

from __future__ import annotations

import functools

import pytest
from families.conformance import CONFORMANCE
from families.short_prompts import SHORT
from families.tiny.ltx import SIZE, make_pipeline

from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    check_adapter(make_pipeline, checks=[check], **SIZE, **SHORT)


@pytest.mark.medium
def test_a_decoder_that_is_told_a_time_generates_as_its_pipeline():
    def make_adapter(pipeline):
        adapter = SHORT["make_adapter"](pipeline)
        adapter.decode_timestep = 0.05
        return adapter

    call = {**SHORT["call_arguments"], "decode_timestep": 0.05, "decode_noise_scale": 0.0}
    make = functools.partial(make_pipeline, timestep_conditioning=True)
    check_adapter(make, make_adapter=make_adapter, checks=["generation"], call_arguments=call, **SIZE)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((48, 32), "height=48: must be a positive multiple of 32, .*; the nearest are 32 and 64"),
        ((32, 32, 4), "num_frames=4: must be 1 plus a multiple of 2, because the VAE .*; the nearest are 3 and 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline()).layout(*size)


@pytest.mark.parametrize(
    ("options", "message"), [({"in_channels": 8}, "8 channels.*text-to-video"), ({"patch_size_t": 2}, "patch_size_t=2")]
)
def test_other_transformers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline(**options))
