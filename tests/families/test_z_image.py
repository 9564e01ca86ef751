"""Z-Image."""

import pytest
from families.conformance import CONFORMANCE
from families.tiny.z_image import make_pipeline

from rlr_trainer.testing import check_adapter


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    check_adapter(make_pipeline, height=16, width=16, checks=[check])
