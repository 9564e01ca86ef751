"""Qwen-Image."""

import pytest
from families.conformance import CONFORMANCE
from families.tiny.qwen_image import make_pipeline

from rlr_trainer.testing import check_adapter


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    # the pipeline guides only where a negative prompt is given; " " is what the model's authors give
    check_adapter(make_pipeline, negative_prompt=" ", checks=[check])
