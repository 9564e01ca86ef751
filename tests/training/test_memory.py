"""Activation memory of the backward sweep: flat in K and in h when recursive, growing when plain."""

import sys
from pathlib import Path

import pytest
import torch

from rlr_trainer.estimators.chain import sample_chain
from rlr_trainer.estimators.plan import EstimatorPlan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import memory
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    chain = memory.make_chain("small", torch.device("cpu"), 1)
    return memory, chain, sample_chain(chain, 1, torch.Generator().manual_seed(1))


def saved_for_backward(bench, plan, mode):
    """Largest number of bytes held for backward at one time."""
    _, chain, rollout = bench
    held, peak = {}, 0

    def pack(tensor):
        nonlocal peak
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        peak = max(peak, sum(held.values()))
        return tensor

    def backward(surrogate):
        surrogate.backward()
        held.clear()
        return 1.0

    from rlr_trainer.estimators import Feedback, Sweep

    draw = plan.draw(1, torch.Generator().manual_seed(0), shared=True)
    feedback = Feedback(torch.ones(1), torch.randn_like(rollout.sample), torch.ones(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Sweep(chain, chain.parameters(), backward, recompute=mode).run(rollout, draw, feedback)
    return peak


@pytest.mark.parametrize("part", ["fo_steps", "ho_length"])
def test_recursive_memory_is_flat_and_plain_memory_is_not(bench, part):
    steps = bench[1].num_steps
    short, long = (EstimatorPlan(steps, **{part: length}) for length in (2, 6))
    flat = saved_for_backward(bench, long, "recursive") / saved_for_backward(bench, short, "recursive")
    grows = saved_for_backward(bench, long, "graph") / saved_for_backward(bench, short, "graph")
    assert 0.95 < flat < 1.05
    assert grows > 2


def test_a_prediction_is_asked_before_the_graph_of_its_step(bench):
    """The peak is that of the larger of the two, not of both."""
    from rlr_trainer.diagnosis.memory import measuring_memory
    from rlr_trainer.estimators import ControlVariateScale, Feedback, Sweep, prediction_critic

    _, chain, rollout = bench
    params = chain.parameters()
    draw = EstimatorPlan(chain.num_steps, rest_estimator="lr", rest_num_steps=1).draw(1, torch.Generator().manual_seed(0))
    critic = prediction_critic(chain, params, lambda x: (x**2).flatten(1).mean(1))

    def peak(work):
        with measuring_memory(torch.device("cpu")) as meter:
            work()
            return meter.peak()

    def update(**options):
        feedback = Feedback(torch.ones(1), scale=torch.ones(1))
        Sweep(chain, params, lambda surrogate: surrogate.backward() or 1.0, **options).run(rollout, draw, feedback)

    step, prediction = peak(update), peak(lambda: critic(1, rollout.latents[1]))
    both = peak(lambda: update(critic=critic, control_scale=ControlVariateScale(chain.num_steps)))
    assert both < 1.15 * max(step, prediction)
    assert step + prediction > 1.5 * max(step, prediction)
