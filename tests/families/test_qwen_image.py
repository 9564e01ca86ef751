"""Qwen-Image."""

import inspect

import pytest
import torch
from families.conformance import CONFORMANCE
from families.tiny.qwen_image import make_pipeline

from rlr_trainer.pipelines import PromptCache, adapt
from rlr_trainer.testing import check_adapter


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    # the pipeline guides only where a negative prompt is given; " " is what the model's authors give. Its own scale is 4
    check_adapter(make_pipeline, negative_prompt=" ", guidance_scale=3.0, checks=[check])


@pytest.mark.parametrize(("prompts", "masked"), [(("a nine", "a five"), False), (("a nine", "the number five"), True)])
def test_a_mask_goes_to_the_network_only_where_prompts_differ_in_length(prompts, masked):
    adapter, seen = adapt(make_pipeline()), []
    layout = adapter.layout(None, None)

    def network(x, **arguments):
        seen.append(arguments["encoder_hidden_states_mask"])
        return x

    conditioning = adapter.encode(prompts, ["", ""], 1.0, layout, PromptCache())
    adapter.predict(network, torch.zeros(2, *layout.shape), 500.0, conditioning)
    assert [mask is not None for mask in seen] == [masked]


def test_an_empty_negative_prompt_is_one():
    adapter = adapt(make_pipeline())
    conditioning = adapter.encode(["a nine"], [""], 4.0, adapter.layout(None, None), PromptCache())
    assert (
        conditioning.negative["encoder_hidden_states_mask"].sum() == 5
    )  # the end of the template: <|im_end|>, \n, <|im_start|>, ...


def test_prompts_have_the_length_of_the_pipelines_call():
    pipeline = make_pipeline()
    default = inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default
    assert adapt(pipeline).max_sequence_length == default


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"in_channels": 32}, "32 channels"),
        ({"guidance_embeds": True}, "guidance_embeds=True"),
        ({"zero_cond_t": True}, "zero_cond_t=True"),
        ({"use_additional_t_cond": True}, "use_additional_t_cond=True"),
        ({"use_layer3d_rope": True}, "use_layer3d_rope=True"),
    ],
)
def test_transformers_of_other_pipelines_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        adapt(make_pipeline(**options))
