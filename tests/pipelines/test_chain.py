"""The chain that a pipeline makes of a batch of prompts."""

import copy

import pytest
import torch

from rlr_trainer import digits
from rlr_trainer.pipelines import PipelineChain, Policy, PromptCache, adapt
from rlr_trainer.schedules import SamplerOptions

PROMPTS = [digits.class_prompt(3), digits.class_prompt(8)]


@pytest.fixture
def chain(pipeline):
    pipeline.unet.requires_grad_(False)
    pipeline.unet.conv_out.requires_grad_(True)
    adapter = adapt(pipeline)
    policy, layout = Policy(adapter.denoiser), adapter.layout(None, None)
    conditioning = adapter.encode(PROMPTS, ["", ""], 1.0, layout, PromptCache())
    schedule, live = adapter.schedule(layout, SamplerOptions(5, 1.0)), policy.trainable_parameters()
    return PipelineChain(adapter, policy, policy, schedule, conditioning, layout, torch.device("cpu"), live)


def test_other_parameters_run_the_same_network(chain):
    """The functional path (perturbed or frozen parameters) and the live one agree, and the first leaves the live weights alone."""
    x = chain.initial(2, torch.Generator().manual_seed(0))
    live, _ = chain.transition(1, x, chain.parameters())
    same, _ = chain.transition(1, x, {name: p.detach().clone() for name, p in chain.parameters().items()})
    torch.testing.assert_close(live, same, rtol=0, atol=0)
    moved, _ = chain.transition(1, x, {name: p.detach() + 0.1 for name, p in chain.parameters().items()})
    assert not torch.allclose(live, moved, atol=1e-3)
    torch.testing.assert_close(chain.transition(1, x, chain.parameters())[0], live, rtol=0, atol=0)


def test_one_step_prediction_at_a_late_step_is_the_schedulers(chain):
    x = chain.initial(2, torch.Generator().manual_seed(0))
    scheduler = copy.deepcopy(chain.adapter.pipeline.scheduler)
    scheduler.set_timesteps(5)
    timestep = scheduler.timesteps[3]
    output = chain.adapter.denoiser(x, timestep, chain.conditioning.positive["encoder_hidden_states"]).sample
    expected = scheduler.step(output, timestep, x, eta=1.0, variance_noise=torch.zeros_like(x)).pred_original_sample
    torch.testing.assert_close(chain.predict_clean(3, x, chain.parameters()), expected, rtol=0, atol=1e-5)
