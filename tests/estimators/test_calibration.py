"""The checker's z-scores are z-scores: over 200 seeds those of right estimators have mean 0 and standard deviation 1.

Were the standard errors too small, right estimators would fail by chance; too large, wrong ones would pass.
"""

import pytest
from statistics_helpers import Estimate, calibration, z_scores
from toy_problems import NUM_STEPS, LinearProblem, group_size, run

from rlr_trainer.estimators.plan import EstimatorPlan

T = NUM_STEPS
NUM_SEEDS = 200
CASES = {
    "first order": (EstimatorPlan.from_preset("full_bp", T), "none"),
    "likelihood ratio": (EstimatorPlan.from_preset("ddpo", T), "none"),
    "leave one out": (EstimatorPlan.from_preset("rlr", T), "leave_one_out"),
    "sub-chain and antithetic zeroth order": (EstimatorPlan.from_preset("rlr_paper", T, zo_scale=0.1), "none"),
    "control variate and a subset of steps": (
        EstimatorPlan(T, fo_steps=1, ho_length=1, rest_estimator="lr", rest_num_steps=1, control_variate=True),
        "none",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_z_scores_of_right_estimators_have_standard_deviation_one(name):
    plan, advantage = CASES[name]
    problem = LinearProblem.make(shared=False)
    target = Estimate.exact(problem.target(plan))
    scores = []
    for seed in range(NUM_SEEDS):
        samples = run(problem.chain, problem.reward, plan, 5000 + seed, 2**13, advantage=advantage).per_sample
        scores.append(z_scores(Estimate.of(samples, group_size(plan, advantage)), target))
    mean, deviation = calibration(scores)
    assert 0.9 < deviation < 1.1, deviation
    assert abs(mean) < 0.25, mean
    along = [run_scores["along gradient"] for run_scores in scores]
    assert sum(abs(z) > 2 for z in along) < 0.12 * NUM_SEEDS  # 4.6 % expected


@pytest.mark.slow
def test_dependent_samples_need_their_group():
    """Antithetic pairs taken for independent samples get standard errors that do not fit; this is why `group` exists."""
    plan = EstimatorPlan.from_preset("es", T, zo_scale=0.1)
    problem = LinearProblem.make(shared=False)
    target = Estimate.exact(problem.target(plan))
    deviations = {}
    for group in (1, 2):
        scores = []
        for seed in range(NUM_SEEDS // 2):
            samples = run(problem.chain, problem.reward, plan, 6000 + seed, 2**12).per_sample
            scores.append(z_scores(Estimate.of(samples, group), target))
        deviations[group] = calibration(scores)[1]
    assert 0.9 < deviations[2] < 1.1
    assert not 0.9 < deviations[1] < 1.1
