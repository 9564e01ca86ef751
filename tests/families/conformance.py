"""The checks of the conformance kit as test ids.

A family's test file needs three lines:

    @pytest.mark.parametrize("check", CONFORMANCE)
    def test_it_conforms(check):
        check_adapter(make_pipeline, checks=[check])
"""

import pytest

from rlr_trainer.testing import CHECKS, SLOW_CHECKS


def all_but(*left_out: str) -> list:
    """The checks as parameters, those that train marked slow."""
    names = [name for name in CHECKS if name not in left_out]
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_CHECKS else name for name in names]


WITH_DDPO = all_but()
FAST = [name for name in CHECKS if name not in SLOW_CHECKS]
# The training with ddpo takes as long as all other checks, and what it could find in an adapter "ratio" and "gradients" find exactly:
# two families run it.
CONFORMANCE = all_but("ddpo")
