"""Imports that the documentation of earlier versions showed still work, and give the same objects."""

import importlib

import pytest

EARLIER = {
    ("rlr_trainer.demo", "ink"): "rlr_trainer.digits.rewards",
    ("rlr_trainer.demo", "digit_reward"): "rlr_trainer.digits.rewards",
    ("rlr_trainer.chains.linear_gaussian", "LinearGaussianChain"): "rlr_trainer.estimators.linear_gaussian",
    ("rlr_trainer.prompts", "open_dataset"): "rlr_trainer.rollouts.prompts",
    ("rlr_trainer.report", "write_report"): "rlr_trainer.observing.report",
}


@pytest.mark.parametrize(("module", "name"), EARLIER)
def test_an_earlier_import(module, name):
    found = {}
    exec(f"from {module} import {name}", found)
    assert found[name] is getattr(importlib.import_module(EARLIER[module, name]), name)


def test_a_name_that_is_not_there():
    with pytest.raises(ImportError, match="nothing"):
        exec("from rlr_trainer.demo import nothing")
