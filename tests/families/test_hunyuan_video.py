"""HunyuanVideo on a tiny pipeline of the real classes."""

from __future__ import annotations

import inspect

import pytest
from families.conformance import CONFORMANCE
from families.tiny.hunyuan_video import SIZE, make_pipeline

from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter

SHORT = {
    "prompt_template": {"template": "{}", "crop_start": 0},
    "max_sequence_length": 24,
}  # the usual template is longer than 77 tokens


def adapt_short(pipeline):
    adapter = adapt(pipeline)
    adapter.prompt_template, adapter.max_sequence_length = SHORT.values()
    return adapter


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    check_adapter(make_pipeline, make_adapter=adapt_short, call_arguments=SHORT, checks=[check], **SIZE)


def test_prompts_are_put_in_the_template_of_the_pipelines_call():
    pipeline = make_pipeline()
    adapter, call = adapt(pipeline), inspect.signature(type(pipeline).__call__).parameters
    assert (adapter.prompt_template, adapter.max_sequence_length) == (call["prompt_template"].default, 256)
    rows = adapter.encode_prompts(["a nine"])
    assert [rows[name].shape[1] for name in ("encoder_hidden_states", "encoder_attention_mask")] == [256, 256]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((24, 16), "height=24: must be a positive multiple of 16, .*; the nearest are 16 and 32"),
        ((16, 16, 6), "num_frames=6: must be 1 plus a multiple of 4, because the VAE .*; the nearest are 5 and 9"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline()).layout(*size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 9}, "9 channels.*text-to-video"),
        ({"image_condition_type": "token_replace"}, "image_condition_type='token_replace'"),
        ({"guidance_embeds": False}, "guidance_embeds=False"),
    ],
)
def test_other_transformers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline(**options))
