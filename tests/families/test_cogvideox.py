"""CogVideoX 1.0 and 1.5 on tiny pipelines of the real classes."""

from __future__ import annotations

import functools

import pytest
import torch
from families.conformance import CONFORMANCE
from families.schedulers import with_scheduler
from families.short_prompts import SHORT
from families.tiny.cogvideox import ROTARY, SIZE, VERSION_1_5, make_pipeline

from rlr_trainer.pipelines import adapt
from rlr_trainer.schedules import SamplerOptions
from rlr_trainer.testing import check_adapter


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    check_adapter(make_pipeline, checks=[check], **SIZE, **SHORT)


def test_rotated_positions_generate_as_their_pipeline():
    make = functools.partial(make_pipeline, **ROTARY)
    check_adapter(with_scheduler(make, "CogVideoXDPMScheduler"), checks=["generation"], **SIZE, **SHORT)


def test_1_5_with_dynamic_guidance_generates_as_its_pipeline():
    """Of 5 frames the VAE takes 3 latent ones, and the transformer a fourth to fill its patches."""

    def make_adapter(pipeline):
        adapter = SHORT["make_adapter"](pipeline)
        adapter.dynamic_cfg_steps = 4
        return adapter

    make = functools.partial(make_pipeline, **VERSION_1_5)
    assert adapt(make()).layout(16, 16, 5).shape == (4, 4, 8, 8)
    call = {**SHORT["call_arguments"], "use_dynamic_cfg": True}
    size = {**SIZE, "num_frames": 5}
    check_adapter(make, make_adapter=make_adapter, checks=["generation", "layout"], call_arguments=call, **size)


def test_dynamic_guidance_counts_with_the_steps_of_the_run():
    adapter = adapt(make_pipeline())
    adapter.dynamic_cfg_steps = 50
    with pytest.raises(ValueError, match="sample_num_steps=10 with the adapter's dynamic_cfg_steps=50: must be equal"):
        adapter.schedule(adapter.layout(16, 16, 4), SamplerOptions(10))


@pytest.mark.parametrize("num_frames", [1, 4, 5, 8, 9])
def test_numbers_of_frames_that_are_taken_are_made(num_frames):
    adapter = adapt(make_pipeline())
    layout = adapter.layout(16, 16, num_frames)
    with torch.no_grad():
        assert adapter.decode(torch.zeros(1, *layout.shape), layout).shape == (1, num_frames, 3, 16, 16)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((20, 16), "height=20: must be a positive multiple of 8, .*; the nearest are 16 and 24"),
        ((16, 16, 7), "num_frames=7: must be a multiple of 4, or one more, .*; the nearest are 5 and 8"),
        ((16, 16, 2), "num_frames=2: .*; the nearest are 1 and 4"),
        ((16, 16, -4), "num_frames=-4: .*; the nearest is 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline()).layout(*size)


def test_sizes_beyond_the_positions_of_1_5_are_refused():
    with pytest.raises(ValueError, match="width=32: the transformer has positions for 24 pixels at most"):
        adapt(make_pipeline(**VERSION_1_5)).layout(16, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 8}, "8 channels.*text-to-video"),
        ({"ofs_embed_dim": 16}, "ofs_embed_dim=16"),
        ({**ROTARY, "use_learned_positional_embeddings": True}, "use_learned_positional_embeddings=True"),
    ],
)
def test_models_that_start_from_a_picture_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline(**options))


def test_prompts_of_another_length_than_the_positions_are_refused():
    adapter = adapt(make_pipeline())
    assert adapter.max_sequence_length == 24
    adapter.max_sequence_length = 16
    with pytest.raises(ValueError, match="max_sequence_length=16: must be 24"):
        adapter.encode_prompts(["a nine"])
