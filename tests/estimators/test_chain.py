"""Sampling a chain and what a sample leaves behind."""

import dataclasses
import math

import pytest
import torch
from torch.distributions import Normal
from toy_problems import LinearProblem, NonlinearChain, seeded

from rlr_trainer.estimators import Perturbations, perturbed_steps
from rlr_trainer.estimators.chain import (
    DenoisingChain,
    PerSampleChain,
    Rollout,
    draw_noise,
    gaussian_log_density,
    gaussian_log_ratio,
    mix_seed,
    next_latent,
    predict_clean,
    sample_chain,
    sum_over_latent,
)
from rlr_trainer.estimators.linear_gaussian import LinearGaussianChain

FIELDS = [field.name for field in dataclasses.fields(Rollout)]


def assert_same(first: Rollout, second: Rollout) -> None:
    for name in FIELDS:
        for a, b in zip(getattr(first, name), getattr(second, name), strict=True):
            assert torch.equal(a, b), name


# ---- sampling ----


@pytest.mark.parametrize("make", [NonlinearChain, lambda: LinearGaussianChain(3)], ids=["nonlinear", "linear"])
def test_a_rollout_is_the_chain_step_by_step(make):
    chain, announced = make(), []
    rollout = sample_chain(chain, 5, seeded(0), on_step=announced.append)
    assert announced == list(range(chain.num_steps))
    assert isinstance(chain, DenoisingChain)
    assert rollout.num_steps == chain.num_steps and rollout.num_samples == 5
    assert len(rollout.latents) == chain.num_steps + 1 and rollout.sample is rollout.latents[-1]
    for step in range(chain.num_steps):
        mean, std = chain.transition(step, rollout.latents[step], chain.parameters())
        assert torch.equal(rollout.means[step], mean) and torch.equal(rollout.stds[step], std)
        assert torch.equal(rollout.latents[step + 1], next_latent(mean, std, rollout.noises[step]))


def test_a_rollout_has_no_graph_and_is_reproducible():
    chain = NonlinearChain()
    chain._parameters = {name: p.requires_grad_() for name, p in chain.parameters().items()}
    rollout = sample_chain(chain, 4, seeded(7))
    assert not any(t.requires_grad for name in FIELDS for t in getattr(rollout, name))
    assert_same(rollout, sample_chain(chain, 4, seeded(7)))
    assert not torch.equal(rollout.sample, sample_chain(chain, 4, seeded(8)).sample)


def test_a_generator_per_sample_makes_its_noise_independent_of_the_batch():
    """Sample 12 alone, last of three or first of two: the same latents, whatever the others are."""
    chain = NonlinearChain()
    batches = [[12], [3, 4, 12], [12, 9]]
    rollouts = [sample_chain(chain, len(batch), [seeded(s) for s in batch]) for batch in batches]
    for batch, rollout in zip(batches, rollouts, strict=True):
        row = batch.index(12)
        for name in ("latents", "noises"):
            for own, alone in zip(getattr(rollout, name), getattr(rollouts[0], name), strict=True):
                torch.testing.assert_close(own[row], alone[0], rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="got 2 generators for 3 samples; pass one per sample"):
        sample_chain(chain, 3, [seeded(0), seeded(1)])


@pytest.mark.parametrize("per_sample", [False, True])
def test_pairs_share_their_noise_and_nothing_else_does(per_sample):
    chain = NonlinearChain()
    generator = [seeded(s) for s in range(3)] if per_sample else seeded(0)
    rollout = sample_chain(chain, 6, generator, paired=True)
    for tensor in (rollout.latents[0], *rollout.noises):
        assert torch.equal(tensor[0::2], tensor[1::2])
        assert len({tuple(row.tolist()) for row in tensor}) == 3
    with pytest.raises(ValueError, match="num_samples=5: antithetic perturbations pair the samples, so it must be even"):
        sample_chain(chain, 5, seeded(0), paired=True)


def test_noise_is_standard_normal_and_independent_from_step_to_step():
    rollout = sample_chain(LinearGaussianChain(3), 20_000, seeded(1))
    noise = torch.cat([rollout.latents[0], *rollout.noises], 1)
    count = len(noise)
    assert (noise.mean(0).abs() < 5 / count**0.5).all()
    deviation = noise.mT @ noise / count - torch.eye(noise.shape[1], dtype=noise.dtype)
    assert (deviation.abs() < 5 * 2**0.5 / count**0.5).all()


def test_drawn_noise_has_the_shape_and_type_of_its_model():
    like = torch.empty(3, 4, 5, dtype=torch.bfloat16)
    for generator in (None, seeded(0), [seeded(s) for s in range(3)]):
        noise = draw_noise(like, generator)
        assert noise.shape == like.shape and noise.dtype == torch.bfloat16
    assert torch.equal(draw_noise(like, seeded(0)), draw_noise(like, seeded(0)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1], ids=["mean", "std"])
def test_what_is_not_finite_is_named_with_its_step(which, value):
    chain = LinearGaussianChain(5)

    def broken(step, x):
        outputs = list(chain.transition(step, x, chain.parameters()))
        if step == 2:
            outputs[which] = torch.full_like(outputs[which], value)
        return tuple(outputs)

    name, shape = (("mean", r"\(4, 2\)"), ("standard deviation|std", r"\(\)"))[which]
    with pytest.raises(
        FloatingPointError, match=rf"step 2 of 5: the ({name}) of the next latent, shape {shape}.*lower the learning rate"
    ):
        sample_chain(chain, 4, seeded(0), step_function=broken)


# ---- rollouts as values ----


def mixed_rollout(num_samples: int = 5) -> Rollout:
    """Standard deviations in every admissible form: a number, one per sample, one per entry."""
    latents = [torch.randn(num_samples, 3, 2, generator=seeded(s)) for s in range(4)]
    stds = (
        torch.tensor(0.5),
        torch.rand(num_samples, 1, 1, generator=seeded(9)),
        torch.rand(num_samples, 3, 2, generator=seeded(8)),
    )
    return Rollout(tuple(latents), tuple(latents[:3]), tuple(latents[1:]), stds)


def test_rows_of_a_rollout():
    rollout, rows = mixed_rollout(), torch.tensor([4, 0, 0])
    picked = rollout.select(rows)
    assert picked.num_samples == 3
    for name in FIELDS:
        for whole, part in zip(getattr(rollout, name), getattr(picked, name), strict=True):
            expanded = whole.expand_as(rollout.latents[0]) if name == "stds" else whole
            assert torch.equal(part.expand_as(picked.latents[0]) if name == "stds" else part, expanded[rows])


def test_joined_rollouts_are_the_whole_again():
    rollout = mixed_rollout()
    halves = [rollout.select(torch.tensor(rows)) for rows in ([0, 1, 2], [3, 4])]
    spread = dataclasses.replace(rollout, stds=(rollout.stds[0], *(std.expand(5, 3, 2) for std in rollout.stds[1:])))
    assert_same(Rollout.concatenate(halves), spread)


def test_a_rollout_moves():
    assert mixed_rollout().to("meta").stds[0].device.type == "meta"


def test_rollouts_join_whose_steps_were_perturbed_at_different_places():
    """Two sampling batches of `rlr_paper` with starts of their own."""
    problem = LinearProblem.make(shared=False)
    params = problem.chain.parameters()
    rollouts = []
    for step in (0, 1):
        zeroth = torch.arange(4)[None] == step
        perturbed = perturbed_steps(problem.chain, params, zeroth, Perturbations.assign(4, 0, 0.1, 2, True))
        rollouts.append(sample_chain(problem.chain, 4, seeded(step), step_function=perturbed, paired=True))
    joined = Rollout.concatenate(rollouts)
    for step in range(4):
        expected = torch.cat([rollout.stds[step].expand(4, 2) for rollout in rollouts])
        assert torch.equal(joined.stds[step].expand(8, 2), expected)


# ---- seeds ----


def test_mixed_seeds_are_distinct_and_spread_over_all_bits():
    """Neighbouring counters and seeds give seeds without a pattern: no collisions, every bit even, half the bits change."""
    seeds = [mix_seed(seed, a, b) for seed in range(20) for a in range(50) for b in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0 and max(seeds) < 2**63
    bits = torch.tensor([[seed >> k & 1 for k in range(63)] for seed in seeds[:10_000]], dtype=torch.float64)
    assert ((bits.mean(0) - 0.5).abs() < 5 * 0.5 / len(bits) ** 0.5).all()
    changed = (bits[1:] != bits[:-1]).double().sum(1)
    assert abs(float(changed.mean()) - 31.5) < 5 * (63 / 4) ** 0.5 / len(changed) ** 0.5 * 2


def test_mixed_seeds_depend_on_the_order_and_number_of_the_counters():
    values = [mix_seed(1), mix_seed(1, 0), mix_seed(1, 0, 0), mix_seed(1, 2, 3), mix_seed(1, 3, 2), mix_seed(2, 1), mix_seed(-1, 0)]
    assert len(set(values)) == len(values)
    assert mix_seed(1, 2, 3) == mix_seed(1, 2, 3)


# ---- densities ----


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("scalar", [True, False], ids=["one std", "a std per entry"])
def test_log_densities_are_those_of_torch_distributions(shape, scalar):
    x, mean, old = (torch.randn(shape, generator=seeded(s), dtype=torch.float64) for s in range(3))
    std = torch.tensor(0.7, dtype=torch.float64)
    if not scalar:
        std = 0.5 + torch.rand(shape, generator=seeded(4), dtype=torch.float64)
    constant = 0.5 * math.log(2 * math.pi) * math.prod(shape[1:])

    def expected(mu, sigma):
        return sum_over_latent(Normal(mu, sigma).log_prob(x))

    torch.testing.assert_close(gaussian_log_density(x, mean, std) - constant, expected(mean, std), rtol=0, atol=1e-10)
    difference = expected(mean, std) - expected(old, std)
    torch.testing.assert_close(gaussian_log_ratio(x, mean, std, old, std), difference, rtol=0, atol=1e-10)
    torch.testing.assert_close(gaussian_log_ratio(x, mean, std, old, std.expand(shape).clone()), difference, rtol=0, atol=1e-10)
    wider = 1.1 * std
    other = expected(mean, wider) - expected(old, std)
    torch.testing.assert_close(gaussian_log_ratio(x, mean, wider, old, std), other, rtol=0, atol=1e-10)
    trained = gaussian_log_ratio(x, mean, std.clone().requires_grad_(), old, std)
    torch.testing.assert_close(trained.detach(), difference, rtol=0, atol=1e-10)
    assert trained.requires_grad


# ---- per-sample parameters and predictions ----


@pytest.mark.parametrize("make", [NonlinearChain, lambda: LinearGaussianChain(4, shared=True)], ids=["nonlinear", "linear"])
def test_the_per_sample_chain_is_the_chain_on_each_row(make):
    chain = make()
    runner = PerSampleChain(chain)
    assert isinstance(runner, DenoisingChain) and runner.num_steps == 4
    base = chain.parameters()
    assert all(runner.parameters()[name] is p for name, p in base.items())
    x = runner.initial(5, seeded(0))
    assert torch.equal(x, chain.initial(5, seeded(0)))
    own = {name: p + 0.1 * torch.randn(5, *p.shape, generator=seeded(1), dtype=p.dtype) for name, p in base.items()}
    same = {name: p.expand(5, *p.shape) for name, p in base.items()}
    for step in range(4):
        together = chain.transition(step, x, base)
        for value, expected in zip(runner.transition(step, x, same), together, strict=True):
            torch.testing.assert_close(value, expected.expand_as(x), rtol=0, atol=1e-14)
        torch.testing.assert_close(runner.predict_clean(step, x, same), chain.predict_clean(step, x, base), rtol=0, atol=1e-14)
        mean, std = runner.transition(step, x, own)
        for row in range(5):
            alone = chain.transition(step, x[row : row + 1], {name: p[row] for name, p in own.items()})
            torch.testing.assert_close(mean[row], alone[0][0], rtol=0, atol=1e-14)
            torch.testing.assert_close(std[row], alone[1].expand(1, 2)[0], rtol=0, atol=1e-14)


def test_the_prediction_at_the_end_is_the_sample_itself():
    chain = NonlinearChain()
    x = torch.randn(3, 2, dtype=torch.float64, generator=seeded(0))
    assert predict_clean(chain, 4, x, chain.parameters()) is x
    assert torch.equal(predict_clean(chain, 1, x, chain.parameters()), chain.predict_clean(1, x, chain.parameters()))

    class Plain:
        num_steps = 4

    with pytest.raises(TypeError, match="Plain has no predict_clean.*control_variate=True and the sqdf preset need"):
        predict_clean(Plain(), 1, x, {})
    assert predict_clean(Plain(), 4, x, {}) is x
