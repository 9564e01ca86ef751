"""The policy that samples for losses on the forward process: how it follows the trained one, and that it does."""

from types import SimpleNamespace

import pytest
import torch
from tiny_adapter import tiny_run

from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.pipelines.old_policy import OldPolicy


def changed(policy, value):
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.fill_(value)


@pytest.fixture
def run():
    return tiny_run(EstimatorPlan.from_preset("nft", 4), with_old_policy=True)


def test_it_follows_after_the_last_update_of_a_rollout(run):
    inside = [True]
    old = OldPolicy(run.policy, (1.0, 0.2, 0.5), lambda: inside[0])
    changed(run.policy, 1.0)
    assert all((weight == 1).all() for weight in old.weights.values())
    seen = []
    for update, value in enumerate((9.0, 3.0, 5.0, 7.0, 9.0), 1):
        inside[0] = update == 1
        changed(run.policy, value)
        old.on_step_end(None, SimpleNamespace(global_step=update), None)
        seen.append(float(old.weights["denoiser.mix"][0, 0]))
    # kept: not asked; min(0.2 (n - 1), 0.5) = 0.2, 0.4, 0.5, 0.5
    assert seen == pytest.approx([1, 0.2 * 1 + 0.8 * 3, 0.4 * 2.6 + 0.6 * 5, 0.5 * 4.04 + 0.5 * 7, 0.5 * 5.52 + 0.5 * 9])
    assert all((p == 9).all() for p in run.policy.trainable_parameters().values())


def test_it_samples(run):
    run.collector.collect(run.policy, 0)  # takes the present weights
    changed(run.policy, 0.0)
    (batch,), _ = run.collector.collect(run.policy, 1)
    fresh = tiny_run(EstimatorPlan.from_preset("nft", 4))
    fresh.collector.collect(fresh.policy, 0)
    (expected,), _ = fresh.collector.collect(fresh.policy, 1)
    assert torch.equal(batch.rollout.sample, expected.rollout.sample)


def test_its_weights_are_saved_and_taken_up(run):
    old, other = (OldPolicy(run.policy, (0.0, 0.0, 0.0), lambda: False) for _ in range(2))
    state = old.state_dict()
    changed(run.policy, 2.0)
    other.load_state_dict(state)
    assert all(torch.equal(other.weights[name], tensor) for name, tensor in state["weights"].items())
    with pytest.raises(ValueError, match="does not fit the weights that are trained"):
        other.load_state_dict({"weights": {}})
