"""The statistics of a diagnosis, with known answers."""

import pytest
import torch

from rlr_trainer.diagnosis.statistics import (
    UNKNOWN,
    Estimate,
    Products,
    RunningVariance,
    bias_square,
    captured,
    jackknife,
    judge_bias,
    largest_share,
    mean_product,
    mean_square,
    product_of_powers,
    reference_square,
    relative_bias_square,
    total_variance,
)

SIZE = 20


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gradients(seed, *, count=10, noise_c=4.0, noise_r=2.0, correlation=0.0, bias=0.0, replicates=200):
    """Updates with known moments, [n, P] each, one pair per replicate: E r = (1, 0, ...), E c = (1 + bias, 0, ...)."""
    generator = seeded(seed)
    noise, own = torch.randn(2, replicates, count, SIZE, generator=generator, dtype=torch.float64) / SIZE**0.5
    mean = torch.zeros(SIZE, dtype=torch.float64)
    mean[0] = 1.0
    own_c = correlation * noise + (1 - correlation**2) ** 0.5 * own
    return list(zip((1 + bias) * mean + noise_c * own_c, mean + noise_r * noise, strict=True))


def one_measurement(seed, **options):
    return Products.of(*gradients(seed, replicates=1, **options)[0])


@pytest.mark.parametrize(("correlation", "bias"), [(0.9, 0.0), (0.0, 0.7), (0.9, 0.7)])
def test_squares_and_products_of_means_are_unbiased(correlation, bias):
    """The plain square of a mean is not: with ten batches of noise 4 it is larger by 16 / 10."""
    expected = {
        mean_square: (1 + bias) ** 2, reference_square: 1.0, mean_product: 1 + bias, bias_square: bias**2, total_variance: 16.0,
    }  # fmt: skip
    products = [Products.of(*pair) for pair in gradients(1, correlation=correlation, bias=bias)]
    for statistic, value in expected.items():
        found = torch.stack([statistic(p) for p in products])
        error = float(found.std()) / len(found) ** 0.5
        assert abs(float(found.mean()) - value) < 4.5 * error, statistic.__name__
        assert error < 0.3  # it would see the plain square


def test_common_noise_sharpens_the_bias():
    def spread(correlation):
        pairs = gradients(2, correlation=correlation, noise_c=2.0)
        return float(torch.stack([bias_square(Products.of(*pair)) for pair in pairs]).std())

    assert spread(0.95) < 0.3 * spread(0.0)


def test_ratios_of_long_measurements():
    products = one_measurement(3, count=800, bias=0.5, noise_c=2.0, noise_r=1.0)
    assert captured(products) == pytest.approx(1.5, abs=0.1)
    assert relative_bias_square(products) == pytest.approx(0.25, abs=0.1)


def test_orthogonal_means_capture_nothing():
    c, r = torch.randn(2, 50, SIZE, generator=seeded(5), dtype=torch.float64)
    r[:, 0] += 10
    c[:, 1] += 10
    products = Products.of(c, r)
    assert abs(captured(products)) < 0.05
    assert relative_bias_square(products) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("statistic", [captured, total_variance, relative_bias_square])
@pytest.mark.medium
def test_the_jackknife_error_is_the_spread_over_replicates(statistic):
    pairs = gradients(6, count=30, noise_c=1.5, noise_r=0.5, bias=0.8, replicates=150)
    results = [jackknife(statistic, Products.of(*pair)) for pair in pairs]
    spread = torch.tensor([e.value for e in results]).std()
    typical = torch.tensor([e.error for e in results]).median()
    assert 0.8 * spread < typical < 1.25 * spread


@pytest.mark.medium
def test_an_absent_bias_is_seldom_seen_and_a_present_one_often():
    def verdicts(bias, count):
        pairs = gradients(7, count=count, noise_c=1.0, noise_r=0.5, bias=bias)
        return [judge_bias(Products.of(*pair), 0.5).verdict for pair in pairs]

    for count in (5, 8):
        assert verdicts(0.0, count).count("biased") <= 3  # of 200; the expected rate is below 1 %
    unbiased = verdicts(0.0, 20)
    assert unbiased.count("none seen") > 180
    assert unbiased.count("biased") <= 3
    assert verdicts(1.0, 20).count("biased") > 190


@pytest.mark.parametrize(
    "options",
    [
        {"noise_c": 50.0, "noise_r": 0.5},
        {"noise_c": 50.0, "noise_r": 50.0, "bias": 1.0},
        {"count": 4, "noise_c": 0.1, "noise_r": 0.1, "bias": 1.0},
    ],
    ids=["much noise", "a reference lost in noise", "four batches"],
)
def test_too_little_to_tell_is_underpowered_and_not_unbiased(options):
    for pair in gradients(8, replicates=20, **options):
        assert judge_bias(Products.of(*pair), 0.5).verdict == "underpowered"


def test_few_batches_give_no_error_rather_than_a_wrong_one():
    two = jackknife(total_variance, one_measurement(10, count=2))
    assert two.value is not None and two.error is None
    assert jackknife(total_variance, one_measurement(10, count=1)) == UNKNOWN
    nothing = Products.of(torch.zeros(0, SIZE), torch.zeros(0, SIZE))
    assert jackknife(relative_bias_square, nothing) == UNKNOWN
    assert judge_bias(nothing, 0.5).verdict == "underpowered"


def test_the_share_of_the_batch_that_deviates_most():
    updates = torch.randn(8, SIZE, generator=seeded(11), dtype=torch.float64)
    deviations = ((updates - updates.mean(0)) ** 2).sum(1)
    # leaving batch b out takes n / (n - 1) times its squared deviation from the sum of squared deviations
    assert largest_share(Products.of(updates, updates)) == pytest.approx(float(deviations.max() / deviations.sum()) * 8 / 7)
    updates[3] *= 100
    assert largest_share(Products.of(updates, updates)) > 0.99
    assert largest_share(Products.of(updates[:2], updates[:2])) is None
    assert largest_share(Products.of(torch.ones(8, SIZE), updates)) is None  # no deviation at all


def test_powers_carry_their_errors():
    found = product_of_powers((Estimate(4.0, 0.4), -0.5), (Estimate(3.0, 0.3), 2))
    assert found.value == pytest.approx(4.5)
    assert found.error == pytest.approx(4.5 * (0.05**2 + 0.2**2) ** 0.5)
    assert product_of_powers((Estimate(4.0, None), 0.5)) == Estimate(2.0, None)
    assert product_of_powers((Estimate(-1.0, 0.1), 2)) == UNKNOWN


def test_running_variances_are_those_of_the_whole_with_the_spread_over_replicates_as_error():
    generator, found = seeded(15), []
    for _ in range(300):
        vectors, running = torch.randn(20, 2, SIZE, generator=generator, dtype=torch.float64), RunningVariance()
        vectors[:, 1] += 2
        for batch in vectors:
            running.add(batch)
        found.append(torch.stack([running.value(), running.error()]))
    torch.testing.assert_close(running.value(), vectors.var(0).sum(-1))
    values, errors = torch.stack(found, 1)
    assert errors.median(0).values == pytest.approx(values.std(0), rel=0.25)
