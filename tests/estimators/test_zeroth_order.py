"""Zeroth order for frozen noise: what is drawn, who runs with it, and the estimate by hand."""

import copy

import pytest
import torch
from toy_problems import EXACT, NonlinearChain, nonlinear_reward, normal, seeded

from rlr_trainer.estimators import Perturbations, Sweep, estimate_gradient, leave_one_out, perturbed_steps, zeroth_order
from rlr_trainer.estimators.chain import sample_chain
from rlr_trainer.estimators.linear_gaussian import LinearGaussianChain
from rlr_trainer.estimators.plan import EstimatorPlan


def directions_of(perturbations: Perturbations, params, step: int, row: int) -> dict[str, torch.Tensor]:
    """s * sign * e of one sample, as the difference of the parameters that it ran with."""
    moved = perturbations.perturb(params, step, int(perturbations.direction[row]), float(perturbations.sign[row]))
    return {name: moved[name] - params[name] for name in params}


@pytest.mark.parametrize("antithetic", [False, True])
def test_zeroth_order_by_hand(antithetic):
    """sum over samples of A / s^2 times what was added to the parameters in the steps of its set C."""
    chain, scale = NonlinearChain(), 0.3
    params = chain.parameters()
    perturbations = Perturbations.assign(8, seed=5, scale=scale, num_directions=2, antithetic=antithetic)
    zeroth = torch.rand(8, 4, generator=seeded(1)) < 0.5
    advantage = normal(8)
    expected = {name: torch.zeros_like(p) for name, p in params.items()}
    for row in range(8):
        for step in range(4):
            if zeroth[row, step]:
                for name, moved in directions_of(perturbations, params, step, row).items():
                    expected[name] += advantage[row] * moved / scale**2
    found = zeroth_order(advantage, zeroth, perturbations, params)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)
    shared = zeroth_order(advantage, zeroth[:1], perturbations, params)
    expanded = zeroth_order(advantage, zeroth[:1].expand(8, 4), perturbations, params)
    for name in params:
        assert torch.equal(shared[name], expanded[name])


def test_directions_are_remade_from_the_seed():
    """Same seed, step and direction: bit-identical, in any order; another of the three: another direction."""
    params = {"a": torch.zeros(50, 4), "b": torch.zeros(3, dtype=torch.bfloat16)}
    make = lambda seed, step, direction: Perturbations.assign(4, seed, 0.1, 2, False).directions(params, step, direction)  # noqa: E731
    first = make(1, 2, 0)
    make(1, 0, 0)
    again = make(1, 2, 0)
    assert all(torch.equal(first[name], again[name]) for name in params)
    assert first["b"].dtype == torch.bfloat16
    for other in (make(2, 2, 0), make(1, 3, 0), make(1, 2, 1)):
        assert abs(float(torch.corrcoef(torch.stack([first["a"].flatten(), other["a"].flatten()]))[0, 1])) < 5 / 200**0.5


def test_a_batch_is_shared_out_evenly():
    plain = Perturbations.assign(12, 0, 0.1, 3, False)
    assert plain.direction.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and plain.sign.tolist() == [1.0] * 12
    paired = Perturbations.assign(12, 0, 0.1, 3, True)
    assert paired.direction.tolist() == plain.direction.tolist()
    assert paired.sign.tolist() == [1.0, -1.0] * 6
    groups = paired.groups()
    assert sorted(torch.cat([rows for rows, _, _ in groups]).tolist()) == list(range(12))
    for rows, direction, sign in groups:
        assert set(paired.direction[rows].tolist()) == {direction} and set(paired.sign[rows].tolist()) == {sign}
    picked = paired.select(torch.tensor([3, 8]))
    assert picked.direction.tolist() == [0, 2] and picked.sign.tolist() == [-1.0, 1.0]
    for size, antithetic in ((10, False), (9, True)):
        with pytest.raises(ValueError, match=f"but the batch has {size} samples; use a batch that is a multiple of"):
            Perturbations.assign(size, 0, 0.1, 3, antithetic)


@pytest.mark.parametrize("antithetic", [False, True])
def test_antithetic_pairs_run_with_opposite_perturbations_on_the_same_noise(antithetic):
    """Every sample's path, replayed alone with its own perturbed parameters."""
    chain = NonlinearChain()
    params = chain.parameters()
    perturbations = Perturbations.assign(8, 5, 0.3, 2, antithetic)
    zeroth = torch.rand(8, 4, generator=seeded(1)) < 0.5
    rollout = sample_chain(
        chain, 8, seeded(2), step_function=perturbed_steps(chain, params, zeroth, perturbations), paired=antithetic
    )
    for row in range(8):
        x = rollout.latents[0][row : row + 1]
        for step in range(4):
            own = params
            if zeroth[row, step]:
                own = {n: params[n] + d for n, d in directions_of(perturbations, params, step, row).items()}
            mean, std = chain.transition(step, x, own)
            torch.testing.assert_close(rollout.means[step][row : row + 1], mean, **EXACT)
            torch.testing.assert_close(rollout.stds[step][row : row + 1], std, **EXACT)
            x = mean + std * rollout.noises[step][row : row + 1]
        torch.testing.assert_close(rollout.sample[row : row + 1], x, **EXACT)
    if antithetic:
        for tensors in (rollout.noises, rollout.latents[:1]):
            assert all(torch.equal(t[0::2], t[1::2]) for t in tensors)
        first, second = (directions_of(perturbations, params, 0, row) for row in (0, 1))
        assert all(torch.allclose(first[name], -second[name], atol=1e-15) for name in params)


def test_zeroth_order_of_the_estimate_is_built_from_its_own_rollout():
    """`estimate_gradient` without per-sample gradients: A e / s averaged by hand, times the weight of the rest."""
    chain = NonlinearChain()
    plan = EstimatorPlan.from_preset("es", 4, zo_scale=0.3, zo_num_perturbations=2, rest_weight=0.5)
    result = estimate_gradient(chain, nonlinear_reward, plan, 8, seeded(4), advantage="leave_one_out")
    drawn = seeded(4)
    plan.draw(8, drawn)
    seed = int(torch.randint(2**62, (), generator=drawn))
    perturbations = Perturbations.assign(8, seed, 0.3, 2, True)
    advantage = leave_one_out(result.rewards, blocks=perturbations.direction).values
    expected = zeroth_order(0.5 * advantage / 8, torch.ones(1, 4, dtype=torch.bool), perturbations, chain.parameters())
    for name, g in expected.items():
        torch.testing.assert_close(result.gradient[name], g, **EXACT)


@pytest.mark.parametrize("per_sample", [False, True])
def test_an_antithetic_pair_shares_its_choices_and_is_left_out_of_its_baseline_together(per_sample, monkeypatch):
    """What reaches the sweep: the same K, start and subset for both, and advantages against the other pairs."""
    seen = {}

    def run(self, rollout, draw, feedback):
        seen.update(draw=draw, feedback=feedback)

    monkeypatch.setattr(Sweep, "run", run)
    chain, plan = NonlinearChain(), EstimatorPlan.from_preset("rlr_paper", 4)
    for seed in range(2):
        result = estimate_gradient(
            chain, nonlinear_reward, plan, 16, seeded(seed), per_sample=per_sample, advantage="leave_one_out"
        )
        draw = seen["draw"]
        for name in ("start", "pathwise", "score", "zeroth"):
            rows = getattr(draw, name)
            assert torch.equal(rows[0::2], rows[1::2])
        assert len(draw.start.unique()) == 2, "pairs choose apart from each other"
        expected = leave_one_out(result.rewards, blocks=torch.arange(16) // 2).values
        share = 1 if per_sample else 1 / 16
        torch.testing.assert_close(seen["feedback"].advantage, expected * share, **EXACT)


def test_perturbed_rows_run_with_the_chain_of_those_rows():
    class ShiftedChain(LinearGaussianChain):
        shift = 100.0 * torch.arange(4, dtype=torch.float64)[:, None]

        def select(self, rows):
            part = copy.copy(self)
            part.shift = self.shift[rows]
            return part

        def transition(self, step, x, params):
            mean, std = super().transition(step, x, params)
            return mean + self.shift, std

    chain, perturbations = ShiftedChain(2), Perturbations.assign(4, 0, 1e-6, 2, True)
    run = perturbed_steps(chain, chain.parameters(), torch.tensor([[True, False]]), perturbations)
    x = torch.zeros(4, 2, dtype=torch.float64)
    torch.testing.assert_close(run(0, x)[0], chain.transition(0, x, chain.parameters())[0], rtol=0, atol=1e-3)
