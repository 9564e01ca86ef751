"""One rollout: who gets which prompt and noise, and what comes out."""

import dataclasses

import pytest
import torch
from tiny_adapter import brightness, tiny_run

from rlr_trainer import RewardError
from rlr_trainer.estimators import NonDifferentiableRewardError
from rlr_trainer.estimators.advantages import PerPromptStatistics
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.rollouts.advantage_rule import AdvantageRule
from rlr_trainer.rollouts.batches import ScoredBatch
from rlr_trainer.rollouts.prompts import DatasetPrompts

PAIRED = EstimatorPlan.from_preset("es", 4, zo_num_perturbations=2, zo_antithetic=True)


def test_the_size_of_the_batches_does_not_change_the_samples():
    """Noise is a function of the seed, the rollout and the number of the sample."""
    (whole,), summary = tiny_run(batch_size=4).collect()
    halves, of_halves = tiny_run(batch_size=2, num_batches=2).collect()
    joined = ScoredBatch.concatenate(halves)
    torch.testing.assert_close(joined.rollout.sample, whole.rollout.sample, rtol=0, atol=1e-6)
    torch.testing.assert_close(joined.advantage, whole.advantage, rtol=0, atol=1e-6)  # over the whole rollout
    assert joined.prompts == whole.prompts == ("a", "aa", "aaa", "aaaa") == of_halves.prompts
    assert torch.equal(joined.index, torch.arange(4))
    assert of_halves.metrics["reward"] == pytest.approx(summary.metrics["reward"])
    other, _ = tiny_run(batch_size=4).collect(1)
    assert not torch.allclose(other[0].rollout.sample, whole.rollout.sample)


@pytest.mark.parametrize("options", [{"batch_size": 2, "num_batches": 2}, {"prediction_size": 3}, {"offload": True}], ids=str)
def test_the_control_variate_is_that_of_the_whole_rollout(options):
    """However many samples are drawn, or predicted, at a time."""
    plan = EstimatorPlan.from_preset("ddpo", 4, control_variate=True)
    (whole,), _ = tiny_run(plan).collect()
    size = options.pop("prediction_size", None)
    run = tiny_run(plan, **options)
    run.collector = dataclasses.replace(run.collector, options=dataclasses.replace(run.collector.options, prediction_size=size))
    joined = ScoredBatch.concatenate(run.collect()[0])
    assert whole.control.baseline.abs().min() > 0
    torch.testing.assert_close(joined.control.baseline, whole.control.baseline, rtol=1e-4, atol=1e-8)
    for step in range(4):
        torch.testing.assert_close(joined.control.gradients[step], whole.control.gradients[step], rtol=1e-4, atol=1e-8)


def test_groups_share_their_prompt_and_pairs_their_noise():
    (batch,), _ = tiny_run(group_size=2).collect()
    assert batch.prompts == ("a", "a", "aa", "aa") and [m["number"] for m in batch.metadata] == [0, 0, 1, 1]
    assert not torch.equal(batch.rollout.latents[0][0], batch.rollout.latents[0][1])
    torch.testing.assert_close(batch.advantage[0], batch.rewards[0] - batch.rewards[1])
    run = tiny_run(PAIRED)
    (batch,), _ = run.collect()
    assert batch.prompts == ("a", "a", "aa", "aa") and run.collector.prompts_per_rollout == 2
    noise = batch.rollout.latents[0]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert batch.perturbations.sign.tolist() == [1, -1, 1, -1]
    torch.testing.assert_close(batch.zeroth_advantage[0] - batch.zeroth_advantage[1], batch.rewards[0] - batch.rewards[1])


def test_statistics_are_kept_by_the_prompt_itself():
    """Not by its lower-case tokens cut off at 77, as in DDPOTrainer (T17)."""
    texts = [f"{'a digit ' * 60}one", f"{'a digit ' * 60}two", "A Digit", "a digit"]
    rule = AdvantageRule("per_prompt", statistics=PerPromptStatistics(16, 4))
    prompts = DatasetPrompts([{"prompt": text} for text in texts], 0, shuffle=False)
    tiny_run(EstimatorPlan.from_preset("ddpo", 4), prompts=prompts, advantages=rule).collect()
    assert set(rule.statistics.buffers) == set(texts)


def test_a_rollout_is_held_once_and_may_wait_outside_the_device(monkeypatch):
    """DDPOTrainer holds whole trajectories on the GPU, twice (T19)."""
    moves, move = [], ScoredBatch.__mro__[1].to
    monkeypatch.setattr(ScoredBatch.__mro__[1], "to", lambda self, device: moves.append(device) or move(self, device))
    (batch,), _ = tiny_run().collect()
    tensors = (*batch.rollout.latents, *batch.rollout.noises, *batch.rollout.means)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(held.values()) == 4 * 4 * batch.rollout.sample[0].numel() * (5 + 4 + 4)  # T + 1 latents, T noises, T means
    assert moves == []
    tiny_run(num_batches=2, offload=True).collect()
    assert moves == ["cpu", "cpu"]


def test_what_hooks_and_logs_get():
    def noted(images, prompts, metadata):
        return brightness(images, prompts, metadata), {"note": len(prompts)}

    steps = []
    run = tiny_run(reward=noted, batch_size=2, num_batches=2)
    _, summary = run.collector.collect(run.policy, 0, steps.append)
    assert steps == [0, 1, 2, 3] * 2
    images, prompts, metadata, rewards, notes = summary.pictures[1]
    assert images.shape == (2, 3, 2, 2) and images.min() >= 0 and images.max() <= 1
    assert (prompts, [m["number"] for m in metadata], notes) == (("aaa", "aaaa"), [2, 3], {"note": 2})
    torch.testing.assert_close(rewards, brightness(images, (), ()))
    assert torch.equal(summary.rewards[2:], rewards)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda i, p, m: torch.ones(3), RewardError, r"shape \(3,\) for a batch of 4"),
        (lambda i, p, m: [torch.nan] * 4, RewardError, "all 4 values for a batch of noise pictures"),
        (lambda i, p, m: i.detach().mean((1, 2, 3)), NonDifferentiableRewardError, "estimator='ddpo'"),
    ],
)
def test_the_probe_finds_a_wrong_reward_and_takes_no_prompt(reward, error, message):
    plan = None if error is NonDifferentiableRewardError else EstimatorPlan.from_preset("ddpo", 4)
    run = tiny_run(plan, reward)
    with pytest.raises(error, match=message):
        run.collector.probe(run.policy)
    assert run.collector.prompts.take(1)[0].prompt == "a"


@pytest.mark.parametrize("options", [{}, {"control_variate": True}, {"fo_steps": 4}], ids=str)
def test_a_decoder_that_overflows_for_one_sample_costs_that_sample(options, monkeypatch):
    """With on_error="skip"; the sample counts as one without a reward, in first order and in predictions too."""
    run = tiny_run(EstimatorPlan.from_preset("rlr", 4, **options), rewards={"on_error": "skip"}, advantages=AdvantageRule("none"))
    decode, broken = run.scorer.adapter.decode, torch.arange(4) == 2

    def overflowing(latents, layout):
        return (latents.sigmoid() if len(latents) != 4 else decode(latents, layout)) / (~broken).float()[:, None, None, None] ** 2

    monkeypatch.setattr(run.scorer.adapter, "decode", overflowing)
    batches, summary = run.collect()
    assert torch.isnan(summary.rewards).tolist() == broken.tolist() and summary.metrics["samples_dropped"] == 1
    gradient, _ = run.gradient(batches)
    assert all(torch.isfinite(g).all() for g in gradient.values()) and any(g.any() for g in gradient.values())
