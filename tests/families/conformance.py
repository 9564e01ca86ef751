"""The checks of the conformance kit as test ids.

A family's test file needs three lines:

    @pytest.mark.parametrize("check", CONFORMANCE)
    def test_it_conforms(check):
        check_adapter(make_pipeline, checks=[check])
"""

import pytest

from rlr_trainer.testing import CHECKS, SLOW_CHECKS

CONFORMANCE = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_CHECKS else name for name in CHECKS]
