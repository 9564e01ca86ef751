"""Growth laws of an update: the fit, and that the page shows the fits of the recorded results."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import growth

X = [5.0, 10.0, 20.0, 50.0]


def test_a_line_is_found_with_its_errors():
    exact = 2 + 0.3 * np.array(X)
    noise = np.random.default_rng(0).normal(0, 0.01, (400, 4))  # relative, as that of a time is
    fits = [growth.line_of(X, list(exact * (1 + row))) for row in noise]
    design = np.stack([np.ones(4), X], 1) / exact[:, None]
    errors = 0.01 * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    for name, value, error in zip("ab", (2, 0.3), errors, strict=True):
        found = [fit[name] for fit in fits]
        assert abs(np.mean(found) - value) < 5 * error / 20
        # a variance estimated with 2 degrees of freedom has a relative standard deviation of 1
        assert abs(np.mean([fit[name + "_error"] ** 2 for fit in fits]) / error**2 - 1) < 5 / 20
        assert {fit["law"] for fit in fits} == {"linear"}


@pytest.mark.parametrize(
    ("y", "law"),
    [
        ([3.0, 3.0, 3.0, 3.0], "constant"),
        ([10.0, 10.1, 9.9, 10.2], "constant"),
        ([1.0, 2.0, 4.0, 10.0], "linear"),
        ([0.25, 1.0, 4.0, 25.0], "neither"),
        ([1.0, 5.0, 1.0, 5.0], "neither"),
    ],
)
def test_laws(y, law):
    assert growth.line_of(X, y)["law"] == law


def test_the_page_has_the_laws_of_the_results():
    results = json.loads(growth.RESULTS.read_text())
    page = (Path(__file__).parents[1] / "docs/memory_and_speed.md").read_text()
    assert growth.table(growth.laws(results["points"])) in page, "put there what benchmarks/growth.py prints"
