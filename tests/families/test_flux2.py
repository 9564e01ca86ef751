"""Flux.2 and Flux.2 klein."""

import functools
import inspect

import pytest
from families.conformance import CONFORMANCE
from families.tiny.flux2 import make_klein, make_pipeline
from peft import LoraConfig

from rlr_trainer.pipelines import adapt, attach_lora
from rlr_trainer.pipelines.flux2 import _warn_of_unused_guidance
from rlr_trainer.testing import check_adapter

DEV_TOKENS, KLEIN_TOKENS = 256, 96  # of a padded prompt, for speed; dev has a system message


@pytest.mark.parametrize("check", CONFORMANCE)
@pytest.mark.medium
def test_it_conforms(check):
    arguments = {"max_sequence_length": DEV_TOKENS}
    check_adapter(make_pipeline, make_adapter=_with_tokens(DEV_TOKENS), call_arguments=arguments, checks=[check])


@pytest.mark.parametrize("check", CONFORMANCE)
@pytest.mark.medium
def test_klein_conforms(check):
    arguments = {"max_sequence_length": KLEIN_TOKENS}
    check_adapter(
        make_klein, make_adapter=_with_tokens(KLEIN_TOKENS), call_arguments=arguments, call_negatives=_embeddings, checks=[check]
    )


@pytest.mark.medium
def test_distilled_klein_is_not_guided(caplog):
    _warn_of_unused_guidance.cache_clear()
    make_distilled = functools.partial(make_klein, distilled=True)
    arguments = {"max_sequence_length": KLEIN_TOKENS}
    check_adapter(make_distilled, make_adapter=_with_tokens(KLEIN_TOKENS), call_arguments=arguments, checks=["generation"])
    assert "sample_guidance_scale has no effect" in caplog.text


def test_lora_goes_into_single_blocks_too():
    adapter = adapt(make_pipeline(num_single_layers=2))
    attach_lora(adapter.denoiser, LoraConfig(r=1, target_modules=list(adapter.lora_targets)), seed=0)
    found = {name for name, _ in adapter.denoiser.named_modules() if name.endswith("lora_A")}
    single = [f"single_transformer_blocks.{i}.attn.{layer}.lora_A" for i in (0, 1) for layer in ("to_qkv_mlp_proj", "to_out")]
    double = [f"transformer_blocks.0.attn.{layer}.lora_A" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    assert found == {*single, *double}


@pytest.mark.parametrize("make", [make_pipeline, make_klein])
def test_prompts_have_the_length_of_the_pipelines_call(make):
    pipeline = make()
    default = inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default
    assert adapt(pipeline).max_sequence_length == default


def test_transformers_of_other_pipelines_are_refused():
    with pytest.raises(ValueError, match="32 channels"):
        adapt(make_pipeline(in_channels=32))


def _with_tokens(count):
    def make_adapter(pipeline):
        adapter = adapt(pipeline)
        adapter.max_sequence_length = count
        return adapter

    return make_adapter


def _embeddings(pipeline, negatives):
    """Klein's call takes negative prompts in this form alone."""
    return {"negative_prompt_embeds": pipeline.encode_prompt(negatives, max_sequence_length=KLEIN_TOKENS)[0]}
