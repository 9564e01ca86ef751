"""Noise windows: the model and the rule by hand, and both on the bundled models."""

import math

import pytest
import torch

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.diagnosis import auto_noise_steps, diagnose
from rlr_trainer.diagnosis.plans import Candidate, sampling_candidates
from rlr_trainer.diagnosis.step_profile import ProfileBuilder
from rlr_trainer.diagnosis.windows import Window, choose_window, measured_windows
from rlr_trainer.diagnosis.workbench import untouched
from rlr_trainer.digits.rewards import ink
from rlr_trainer.estimators.plan import EstimatorPlan


def black_box(images, prompts, metadata):
    return images.detach().mean((1, 2, 3))


def test_merit_is_signal_over_variance_and_time():
    assert Window(2, 0, signal=6.0, variance=3.0, seconds=0.5).merit == 4.0
    assert Window(2, 3, 6.0, 3.0, 0.5).covered == 5


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        ([1.0, 2.0, 1.0], 2),
        ([1.0, 2.0, 1.9], 3),  # within a tenth of the best: the one that leaves less out
        ([5.0, 2.0, 1.0], 1),
    ],
)
def test_the_best_window(signals, expected):
    windows = [Window(n + 1, 0, signal, 1.0, 1.0) for n, signal in enumerate(signals)]
    assert choose_window(windows).noise_steps == expected


def test_no_window_is_an_error():
    with pytest.raises(ValueError, match="no window"):
        choose_window([])


@pytest.mark.medium
def test_windows_are_sums_of_the_shares_of_their_steps(make_trainer):
    with untouched(make_trainer(reward_function=ink, estimator="rlr", fo_steps=1)) as bench:
        builder = ProfileBuilder(bench, differentiable=True)
        assert builder.windows == [(1, 1), (2, 1), (3, 1), (4, 0), (1, 3), (2, 2)]
        shares = [builder.add(bench.collect(number, builder.reference)) for number in range(3)]
        found = measured_windows(builder, reward_seconds=1e6)
    updates = torch.stack([ratio[:2].sum(0) + first_order[3:].sum(0) for first_order, ratio in shares])
    (window,) = (w for w in found if (w.noise_steps, w.fo_steps) == (2, 1))
    assert window.variance == pytest.approx(float(updates.var(0).sum()), rel=1e-4)
    single = torch.stack([ratio for _, ratio in shares]).var(0).sum(1)  # [T]
    worth = [std * math.sqrt(float(v)) for std, v in zip(bench.stds, single, strict=True)]
    assert window.signal == pytest.approx((worth[0] + worth[1] + worth[3]) ** 2, rel=1e-4)
    assert window.seconds > 1e6


@pytest.mark.medium
def test_a_window_for_a_black_box(make_trainer):
    trainer = make_trainer(reward_function=black_box, estimator="rlr_black_box", noise_steps="auto")
    queries = trainer.rewards.queries
    window, windows = auto_noise_steps(trainer)
    assert [w.noise_steps for w in windows] == [1, 2, 3, 4]
    assert {w.fo_steps for w in windows} == {0}
    assert window is choose_window(windows)
    assert window.noise_steps < 4  # the last step's noise is small, and its likelihood ratio by far the noisiest
    assert trainer.rewards.queries - queries <= 5 * trainer.args.per_device_train_batch_size


@pytest.mark.medium
def test_a_window_with_k_leaves_no_step_out(make_trainer):
    window, windows = auto_noise_steps(make_trainer(reward_function=ink, estimator="rlr", noise_steps="auto", fo_steps="auto"))
    assert {w.covered for w in windows} == {4}
    assert window.fo_steps == 2  # at most half of the chain
    fixed, windows = auto_noise_steps(make_trainer(reward_function=ink, estimator="rlr", noise_steps="auto", fo_steps=1))
    assert [(w.noise_steps, w.fo_steps) for w in windows if w.covered == 4]  # nothing is left out without silent_estimator
    assert {w.covered for w in windows} == {4}
    assert fixed in windows


@pytest.mark.medium
def test_a_chain_whose_last_step_adds_no_noise(tmp_path):
    """Flow-CPS: the diagnosis measures the others, and says whose share is missing."""
    config = RLRConfig(
        output_dir=str(tmp_path), sample_num_steps=4, sample_guidance_scale=1.0, per_device_train_batch_size=4, lora_r=2, use_cpu=True,
        disable_tqdm=True, estimator="rlr_black_box", noise_steps="auto",
    )  # fmt: skip
    trainer = RLRTrainer(config, black_box, lambda: (digits.PROMPT, {}), digits.load_pipeline("digits-flow"))
    assert trainer.parts.schedule.stds[-1] == 0
    _, windows = auto_noise_steps(trainer)
    assert [w.noise_steps for w in windows] == [1, 2, 3]
    with untouched(trainer) as bench:
        own = Candidate("yours", bench.plan, bench.configured_options)
    diagnosis = diagnose(trainer, num_batches=2, time_limit=600, candidates=[own])
    assert diagnosis.settings["reference"] == "likelihood ratio (ddpo), without the share of 1 steps that add no noise"
    assert diagnosis.profile.lr_variance[-1] is None
    assert all(v > 0 for v in diagnosis.profile.lr_variance[:-1])
    assert [w.noise_steps for w in diagnosis.windows] == [1, 2, 3]
    assert "noise in the first" in diagnosis.table()


def test_no_noise_at_the_first_step(make_trainer):
    trainer = make_trainer(reward_function=ink, noise_steps=[2, 3], fo_steps=1, silent_estimator="none")
    with untouched(trainer) as bench:
        assert ProfileBuilder(bench, differentiable=True).windows == []
        assert ProfileBuilder(bench, differentiable=False).plans["ho"] == EstimatorPlan(
            4, rest_estimator="lr", silent_estimator="none", silent_steps=(0, 1)
        )


@pytest.mark.slow
def test_candidates_with_other_noise_are_measured_against_their_own_gradient(make_trainer):
    trainer = make_trainer(reward_function=ink, estimator="rlr", fo_steps=1)
    with untouched(trainer) as bench:
        own = Candidate("yours", bench.plan, bench.configured_options)
        candidates = sampling_candidates(own, bench.schedule, differentiable=True)
    assert [c.name for c in candidates] == ["rlr K=2, noise in 2 steps", "rlr_black_box", "yours, sample_eta=0.5"]
    assert [sum(std > 0 for std in c.schedule.stds) for c in candidates] == [2, 2, 4]
    diagnosis = diagnose(trainer, candidates=[own, *candidates], num_batches=3, time_limit=600)
    assert {row.name for row in diagnosis.rows if row.sampled_otherwise} == {c.name for c in candidates}
    assert [row.name for row in diagnosis.rows if row.is_yours] == ["yours"]
    complete, partial = diagnosis.row("rlr K=2, noise in 2 steps"), diagnosis.row("rlr_black_box")
    assert complete.is_unbiased
    assert not partial.is_unbiased
    assert 0 < partial.captured.value < 1  # the steps without noise are missing
    assert complete.captured.value == pytest.approx(1, abs=0.5)
    for c in candidates:  # what stands in the table can be put into a config; last, as a config makes accelerate's state anew
        assert RLRConfig(use_cpu=True, sample_num_steps=4, **c.options).plan.on_noise(c.schedule.stds) == c.plan


@pytest.mark.slow
def test_no_share_is_told_of_other_noise_for_a_black_box(make_trainer):
    trainer = make_trainer(reward_function=black_box, estimator="ddpo")
    with untouched(trainer) as bench:
        own = Candidate("yours", bench.plan, bench.configured_options)
        candidates = sampling_candidates(own, bench.schedule, differentiable=False)
    assert [c.name for c in candidates] == ["rlr_black_box", "yours, sample_eta=0.5"]
    diagnosis = diagnose(trainer, candidates=[own, *candidates], num_batches=3, time_limit=600)
    assert diagnosis.row("rlr_black_box").captured.value is None
    assert diagnosis.row("rlr_black_box").std.value > 0
