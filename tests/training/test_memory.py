"""What the backward sweep holds for its backward passes: flat in K and in h when recursive, growing when plain."""

import pytest
import torch
from tiny_adapter import brightness, tiny_run

from rlr_trainer.estimators import Feedback, Sweep, prediction_critic
from rlr_trainer.estimators.chain import sample_chain
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.rollouts.prompts import PromptRow

STEPS = 8


class Saved:
    """Bytes held for backward; a backward pass frees them."""

    def __init__(self):
        self.held, self.peak = {}, 0

    def pack(self, tensor):
        self.held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.held.values()))
        return tensor

    def backward(self, surrogate):
        surrogate.backward()
        self.held.clear()
        return 1.0


def sweep(plan, asked=None, **options):
    """What a sweep of this plan holds at most."""
    saved, run = Saved(), tiny_run(plan)
    chain = run.sampler.chain(run.policy, run.sampler.condition([PromptRow("a", {})]))
    rollout = sample_chain(chain, 1, torch.Generator().manual_seed(1))
    critic = prediction_critic(chain, chain.parameters(), lambda x: brightness(x, (), ()))

    def watched(step, x):
        if asked is not None:
            asked.append(step)
        assert not saved.held, "the graph of a step is there when its prediction is asked: both need memory at once"
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return critic(step, x)

    draw = plan.draw(1, torch.Generator().manual_seed(0), shared=True)
    feedback = Feedback(torch.ones(1), torch.ones_like(rollout.sample), torch.ones(1))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        result = Sweep(chain, chain.parameters(), saved.backward, critic=watched, **options).run(rollout, draw, feedback)
    return saved.peak, result


@pytest.mark.parametrize("part", ["fo_steps", "ho_length"])
def test_recursive_memory_is_flat_and_plain_memory_is_not(part):
    short, long = (EstimatorPlan(STEPS, **{part: length}) for length in (2, 6))
    assert 0.9 < sweep(long, recompute="recursive")[0] / sweep(short, recompute="recursive")[0] < 1.1
    assert sweep(long, recompute="graph")[0] > 2 * sweep(short, recompute="graph")[0]


def test_a_prediction_is_asked_before_the_graph_of_its_step():
    asked: list[int] = []
    sweep(EstimatorPlan.from_preset("sqdf", STEPS), asked=asked)
    assert asked == list(range(STEPS, 0, -1))
