"""The divergence from the reference policy in the trainer: metric, penalty, and what it refuses."""

import copy

import pytest
import torch

from rlr_trainer import digits
from rlr_trainer.estimators.divergence import gaussian_divergence
from rlr_trainer.estimators.plan import PlanError


def perturb(trainer, scale=0.02):
    """Moves the trained weights away from the start, so that there is a divergence."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.policy.trainable_parameters().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def replay(trainer, untouched, experience, rewards_of):
    """E[R] - w KL of a batch by plain autograd through the whole chain, the reference being an untouched pipeline."""
    from rlr_trainer.pipelines import PipelineChain, Policy, adapt

    chain = trainer._make_chain(trainer.model, experience.conditioning)
    adapter = adapt(untouched)
    policy = Policy(adapter.denoiser)
    reference = PipelineChain(
        adapter, policy, policy, trainer.schedule, experience.conditioning, trainer.latent_shape, torch.device("cpu")
    )
    x, kl = experience.rollout.latents[0], 0.0
    for step in range(chain.num_steps):
        mean, std = chain.transition(step, x, chain.parameters())
        kl = kl + gaussian_divergence(mean, std, *reference.transition(step, x, reference.parameters()))
        x = mean + std * experience.rollout.noises[step]
    return rewards_of(trainer.adapter.decode(x)), kl


@pytest.mark.parametrize("use_lora", [True, False], ids=["lora", "whole-network"])
@pytest.mark.parametrize("recompute", ["recursive", "graph"])
def test_gradient_is_that_of_reward_minus_divergence(make_trainer, pipeline, seven, use_lora, recompute):
    untouched = copy.deepcopy(pipeline)
    coefficient = 0.05
    trainer = make_trainer(
        estimator="full_bp", kl_coef=coefficient, advantage="none", max_steps=1, use_lora=use_lora, recompute=recompute, max_grad_norm=0.0,
        log_estimator_norms=False,
    )  # fmt: skip
    perturb(trainer, 0.02 if use_lora else 0.002)
    batches, summary = trainer._collector(trainer.model).collect(0)
    reward, kl = replay(trainer, untouched, batches[0], lambda images: seven(images, (digits.PROMPT,) * 4, ({},) * 4))
    assert summary.metrics["kl"] == pytest.approx(float(kl.detach().mean()), rel=1e-4)
    assert float(kl.detach().min()) > 0.01
    parameters = trainer.policy.trainable_parameters()
    expected = torch.autograd.grad((reward - coefficient * kl).mean(), list(parameters.values()))
    plain = torch.autograd.grad(replay(trainer, untouched, batches[0], seven_of(seven))[0].mean(), list(parameters.values()))
    trainer.training_step(trainer.model, {})
    size = max(float(g.abs().max()) for g in expected)
    assert max(float((e - p).abs().max()) for e, p in zip(expected, plain, strict=True)) > 0.05 * size
    for parameter, gradient in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(-parameter.grad, gradient, rtol=0, atol=2e-4 * size)


def seven_of(seven):
    return lambda images: seven(images, (digits.PROMPT,) * len(images), ({},) * len(images))


def test_metric_starts_at_zero_and_grows_with_training(make_trainer):
    trainer = make_trainer(kl_coef=0.0, max_steps=3, learning_rate=5e-3)
    trainer.train()
    lines = [row["kl"] for row in trainer.state.log_history if "loss" in row]
    assert lines[0] == 0.0
    assert all(value > 0 for value in lines[1:])


@pytest.mark.parametrize("estimator", ["full_bp", "rlr", "ddpo"])
def test_the_penalty_alone_leads_back_to_the_reference(make_trainer, estimator):

    def nothing(images, prompts, metadata):
        return 0 * images.mean((1, 2, 3))

    trainer = make_trainer(estimator=estimator, kl_coef=1.0, max_steps=12, learning_rate=3e-3, reward_function=nothing)
    perturb(trainer)
    trainer.train()
    lines = [row["kl"] for row in trainer.state.log_history if "loss" in row]
    assert lines[-1] < 0.5 * lines[0]


def test_without_it_there_is_no_metric_and_the_run_is_the_same(make_trainer, pipeline):
    weights = []
    for options in ({}, {"kl_coef": 0.0}):
        trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), overwrite=True, **options)
        trainer.train()
        assert ("kl" in trainer.state.log_history[0]) == bool(options)
        weights.append([p.detach().clone() for p in trainer.policy.trainable_parameters().values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_inner_epochs_and_other_batch_sizes(make_trainer, pipeline):
    """The divergence of a sample does not depend on the batch that it was sampled in."""
    found = []
    for options in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ):
        trainer = make_trainer(
            sd_pipeline=copy.deepcopy(pipeline),
            estimator="ddpo",
            advantage="leave_one_out",
            optim="sgd",  # Adam's first step would blow up the rounding of gradients near 0
            kl_coef=1.0,
            max_steps=1,
            overwrite=True,
            **options,
        )
        perturb(trainer)
        trainer.train()
        found.append({name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()})
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=2e-5)


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
