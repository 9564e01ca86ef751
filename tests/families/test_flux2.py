"""Flux.2 and Flux.2 klein."""

import pytest
from families.conformance import CONFORMANCE
from families.tiny.flux2 import make_klein, make_pipeline

from rlr_trainer.testing import check_adapter


@pytest.mark.parametrize("check", CONFORMANCE)
@pytest.mark.parametrize("make", [make_pipeline, make_klein], ids=["dev", "klein"])
def test_it_conforms(make, check):
    check_adapter(make, checks=[check])
