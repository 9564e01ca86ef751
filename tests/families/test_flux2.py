"""Flux.2 and Flux.2 klein."""

import inspect

import pytest
from families.conformance import CONFORMANCE
from families.tiny.flux2 import make_klein, make_pipeline

from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter

DEV_TOKENS, KLEIN_TOKENS = 256, 96  # of a padded prompt, for speed; dev has a system message


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    arguments = {"max_sequence_length": DEV_TOKENS}
    check_adapter(make_pipeline, make_adapter=_with_tokens(DEV_TOKENS), call_arguments=arguments, checks=[check])


@pytest.mark.parametrize("check", CONFORMANCE)
def test_klein_conforms(check):
    arguments = {"max_sequence_length": KLEIN_TOKENS}
    check_adapter(
        make_klein, make_adapter=_with_tokens(KLEIN_TOKENS), call_arguments=arguments, call_negatives=_embeddings, checks=[check]
    )


def _with_tokens(count):
    def make_adapter(pipeline):
        adapter = adapt(pipeline)
        adapter.max_sequence_length = count
        return adapter

    return make_adapter


def _embeddings(pipeline, negatives):
    """Klein's call takes negative prompts in this form alone."""
    return {"negative_prompt_embeds": pipeline.encode_prompt(negatives, max_sequence_length=KLEIN_TOKENS)[0]}
