"""Stable Diffusion XL: base, SDXL-Turbo's settings, LCM-SDXL, and what is refused."""

import functools

import pytest
from families.conformance import CONFORMANCE
from families.tiny.sdxl import make_pipeline

from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    check_adapter(make_pipeline, checks=[check])
