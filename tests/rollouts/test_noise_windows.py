"""A rollout whose noise is in a window of its own: sampled, drawn and differentiated as if that window were the fixed one."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny_adapter import SHAPE, tiny_run

from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.pipelines import Layout
from rlr_trainer.rollouts.batches import ScoredBatch
from rlr_trainer.schedules import NoiseWindows, SamplerOptions

LEFT_OUT = EstimatorPlan.from_preset("ddpo", 4, silent_estimator="none")
POSITIONS = [(0, 1), (1, 2), (2, 3)]
PLANS = {
    "left out": LEFT_OUT,
    "segments": EstimatorPlan.from_preset("ddpo", 4, silent_estimator="ho", fo_steps=1),
    "control variate": EstimatorPlan.from_preset("ddpo", 4, silent_estimator="none", control_variate=True),
    "sub-chain": EstimatorPlan.from_preset("rlr", 4, fo_steps=1, ho_length=2, silent_estimator="none"),
}


def schedule(run, window):
    return run.sampler.adapter.schedule(Layout(SHAPE, 2, 2), SamplerOptions(4, 1.0, noise_steps=window))


def moving(plan=LEFT_OUT, kind="progressive", **options):
    """A run whose sampler has its noise in the first window, and whose rollouts go from window to window."""
    run = tiny_run(plan, **options)
    run.sampler.schedule = schedule(run, POSITIONS[0])
    windows = NoiseWindows(kind, tuple(schedule(run, window) for window in POSITIONS))
    run.collector = dataclasses.replace(run.collector, windows=windows)
    return run


def fixed(window, plan=LEFT_OUT, **options):
    run = tiny_run(plan, **options)
    run.sampler.schedule = schedule(run, window)
    run.plan_state.take(plan.on_noise(run.sampler.schedule.stds))
    return run


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("number", range(3))
def test_the_same_as_with_that_window_fixed(name, number):
    plan = PLANS[name]
    run, expected = moving(plan), fixed(POSITIONS[number], plan)
    batches, summary = run.collect(number)
    others, _ = expected.collect(number)
    assert [step for step, std in enumerate(batches[0].rollout.stds) if std > 0] == list(POSITIONS[number])
    assert summary.metrics["noise_window"] == POSITIONS[number][0]
    assert torch.equal(batches[0].draw.score, others[0].draw.score)
    gradient, _ = run.gradient(batches)
    for parameter, value in expected.gradient(others)[0].items():
        assert torch.equal(gradient[parameter], value) and value.any()


def test_all_batches_of_a_rollout_share_their_window_which_survives_selecting_and_joining():
    run = moving(kind="random", batch_size=2, num_batches=3)
    for number in range(6):
        batches, _ = run.collect(number)
        joined = ScoredBatch.concatenate(batches).select(torch.tensor([4, 1])).to("cpu")
        assert {id(part.schedule) for part in [*batches, joined]} == {id(run.collector.schedule_of(number))}
        noisy = (joined.draw.score != 0).any(0).nonzero()[:, 0].tolist()
        assert noisy == [step for step, std in enumerate(joined.schedule.stds) if std > 0]


def test_every_process_has_the_same_window():
    run = moving(kind="random")
    other = dataclasses.replace(run.collector, processes=SimpleNamespace(count=2, index=1))
    drawn = [run.collector.schedule_of(number) for number in range(20)]
    assert drawn == [other.schedule_of(number) for number in range(20)] and len(set(drawn)) == 3


def test_pictures_outside_training_have_the_noise_in_the_first_window():
    run = moving()
    run.collect(2)
    rows = run.collector.prompts.peek(2)
    stds = run.sampler.sample(run.policy, rows, [torch.Generator().manual_seed(i) for i in range(2)]).stds
    assert [step for step, std in enumerate(stds) if std > 0] == [0, 1]
