"""The divergence from the reference policy in the trainer: metric, penalty, and what it refuses."""

import copy

import pytest
import torch
from tiny_adapter import tiny_run

from rlr_trainer.estimators.divergence import gaussian_divergence
from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.pipelines import Policy
from rlr_trainer.rollouts.advantage_rule import AdvantageRule


def perturb(policy, scale=0.02):
    """Moves the trained weights away from the start, so that there is a divergence."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def replay(chain, reference, rollout, score):
    """Rewards and divergences of a batch by plain autograd through the whole chain."""
    x, kl = rollout.latents[0], 0.0
    for step in range(chain.num_steps):
        mean, std = chain.transition(step, x, chain.parameters())
        kl = kl + gaussian_divergence(mean, std, *reference.transition(step, x, reference.parameters()))
        x = mean + std * rollout.noises[step]
    return score(x), kl


def check_gradient(found, summary, reward, kl, coefficient, params):
    """Of E[R] - coefficient * KL, where the divergence counts."""
    assert summary.metrics["kl"] == pytest.approx(float(kl.detach().mean()), rel=1e-4)
    assert float(kl.detach().min()) > 0.01
    objective = (reward - coefficient * kl).mean()
    expected = torch.autograd.grad(objective, list(params.values()), retain_graph=True)
    plain = torch.autograd.grad(reward.mean(), list(params.values()))
    size = max(float(g.abs().max()) for g in expected)
    assert max(float((e - p).abs().max()) for e, p in zip(expected, plain, strict=True)) > 0.05 * size
    for name, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(-found[name], gradient, rtol=0, atol=2e-4 * size)


@pytest.mark.parametrize("recompute", ["recursive", "graph"])
def test_gradient_is_that_of_reward_minus_divergence(recompute):
    run = tiny_run(
        EstimatorPlan.from_preset("full_bp", 4),
        advantages=AdvantageRule("none"),
        with_reference=True,
        kl_coef=0.05,
        recompute=recompute,
    )
    reference = Policy(copy.deepcopy(run.policy.denoiser))
    perturb(run.policy, 0.2)
    (batch,), summary = run.collect()
    chain = run.sampler.chain(run.policy, batch.conditioning)
    reward, kl = replay(chain, chain.under(reference), batch.rollout, run.scorer.differentiable(batch.prompts, batch.metadata))
    found, (metrics, _) = run.gradient([batch])
    check_gradient(found, summary, reward, kl, 0.05, run.policy.trainable_parameters())
    assert metrics["loss"] == pytest.approx(-float((reward - 0.05 * kl).detach().mean()), rel=1e-5)
    parts, _ = run.gradient([batch.select(torch.tensor(rows)) for rows in ([2], [3, 0, 1])])
    assert all(torch.allclose(parts[name], tensor, atol=1e-6) for name, tensor in found.items())


@pytest.mark.medium
def test_lora_weights_are_off_in_the_reference(make_trainer, pipeline):
    untouched = Policy(copy.deepcopy(pipeline).unet)
    trainer = make_trainer(
        estimator="full_bp", kl_coef=0.05, advantage="none", max_steps=1, max_grad_norm=0.0, log_estimator_norms=False
    )
    parts = trainer.parts
    perturb(trainer.policy)
    (batch,), summary = parts.collector.collect(trainer.model, 0)
    chain = parts.sampler.chain(trainer.model, batch.conditioning)
    reward, kl = replay(chain, chain.under(untouched), batch.rollout, parts.scorer.differentiable(batch.prompts, batch.metadata))
    trainer.training_step(trainer.model, {})
    params = trainer.policy.trainable_parameters()
    check_gradient({name: p.grad for name, p in params.items()}, summary, reward, kl, 0.05, params)


@pytest.mark.medium
def test_metric_starts_at_zero_and_grows_with_training(make_trainer):
    trainer = make_trainer(kl_coef=0.0, max_steps=3, learning_rate=5e-3)
    trainer.train()
    lines = [row["kl"] for row in trainer.state.log_history if "loss" in row]
    assert lines[0] == 0.0
    assert all(value > 0 for value in lines[1:])


@pytest.mark.medium
def test_the_penalty_alone_leads_back_to_the_reference(make_trainer):
    def nothing(images, prompts, metadata):
        return 0 * images.mean((1, 2, 3))

    trainer = make_trainer(
        estimator="rlr", kl_coef=1.0, max_steps=12, learning_rate=3e-3, reward_function=nothing, sample_num_steps=3
    )
    perturb(trainer.policy)
    trainer.train()
    lines = [row["kl"] for row in trainer.state.log_history if "loss" in row]
    assert lines[-1] < 0.5 * lines[0]


@pytest.mark.medium
def test_without_it_there_is_no_metric_and_the_run_is_the_same(make_trainer, pipeline):
    weights = []
    for options in ({}, {"kl_coef": 0.0}):
        trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), overwrite=True, **options)
        trainer.train()
        assert ("kl" in trainer.state.log_history[0]) == bool(options)
        weights.append([p.detach().clone() for p in trainer.policy.trainable_parameters().values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kl_coef": -1.0}, ValueError, "kl_coef=-1.0: must be 0"),
        ({"kl_coef": 0.1, "estimator": "es", "zo_num_perturbations": 2}, ValueError, "kl_coef=0.1 with a zeroth-order plan"),
        ({"kl_coef": 0.1, "estimator": "full_bp", "sample_eta": 0.0}, ValueError, "kl_coef=0.1: step 0 of 4 adds no noise"),
    ],
)
def test_what_cannot_be_is_refused(make_trainer, options, error, message):
    with pytest.raises((error, PlanError), match=message):
        make_trainer(**options)
