"""A plan in force, and what is kept of it in a checkpoint."""

from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_state import PlanState


def state_of(steps=6, **options):
    return PlanState(EstimatorPlan.from_preset("rlr", steps, **options))


def test_a_plan_has_the_state_that_it_needs():
    assert (state_of().starts, state_of().control_scale, state_of().state_dict()) == (None, None, {})
    learning = state_of(ho_start="grad_norm", control_variate=True)
    assert learning.start_probabilities() == learning.starts.probabilities()
    learning.take(state_of().plan)
    assert (learning.start_probabilities(), learning.control_scale) == (None, None)


def test_what_was_learnt_is_taken_up_where_the_chain_is_the_same(caplog):
    options = {"ho_start": "grad_norm", "control_variate": True}
    learnt, same, other = state_of(**options), state_of(**options), state_of(5, **options)
    learnt.starts.update(0, 100.0)
    same.load_state_dict(learnt.state_dict())
    assert same.state_dict() == learnt.state_dict() and not caplog.records
    fresh = other.state_dict()
    other.load_state_dict(learnt.state_dict())
    assert other.state_dict() == fresh
    assert "ho_start='grad_norm': what the checkpoint learned is of another chain" in caplog.text
    assert "control_variate: what the checkpoint learned is of another chain" in caplog.text
