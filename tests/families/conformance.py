"""The checks of the conformance kit as test ids.

A family's test file needs three lines:

    @pytest.mark.parametrize("check", CONFORMANCE)
    def test_it_conforms(check):
        check_adapter(make_pipeline, checks=[check])
"""

import pytest

from rlr_trainer.testing import CHECKS, SLOW_CHECKS

WITH_DDPO = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_CHECKS else name for name in CHECKS]
FAST = [name for name in CHECKS if name not in SLOW_CHECKS]
# The training with ddpo takes as long as all other checks, and what it could find in an adapter "ratio" and "gradients" find exactly:
# two families run it.
CONFORMANCE = [check for check in WITH_DDPO if getattr(check, "values", (check,))[0] != "ddpo"]
