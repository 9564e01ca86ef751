"""From latents to rewards and their gradients."""

import math

import pytest
import torch
from tiny_adapter import SHAPE, brightness, tiny_run

from rlr_trainer import RewardError
from rlr_trainer.estimators import NonDifferentiableRewardError
from rlr_trainer.rollouts.scorer import RolloutScoring, check_rollout, reward_metrics

PROMPTS, METADATA = ("a", "b", "c"), ({},) * 3


def latents(count=3):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_rewards_and_their_gradients():
    scorer = tiny_run(reward=brightness).scorer
    x = latents().requires_grad_(True)
    (expected,) = torch.autograd.grad(x.sigmoid().mean((1, 2, 3)).sum(), x)
    scored = scorer.score_with_gradient(x, PROMPTS, METADATA, "here")
    torch.testing.assert_close(scored.gradient, expected)
    torch.testing.assert_close(scored.result.total, x.detach().sigmoid().mean((1, 2, 3)))
    assert not (scored.images.requires_grad or scored.result.total.requires_grad)
    assert torch.equal(scorer.score(x, PROMPTS, METADATA, "here").result.total, scored.result.total)
    assert scorer.differentiable(PROMPTS, METADATA)(x).requires_grad


def test_gradients_in_pieces_and_apart():
    def dark(images, prompts, metadata):
        return 1 - images.mean((1, 2, 3))

    sizes = []

    def watched(images, prompts, metadata):
        sizes.append(len(images))
        return brightness(images, prompts, metadata)

    scorer = tiny_run(reward=[watched, dark], rewards={"weights": [3.0, 1.0], "batch_size": 2}).scorer
    scored = scorer.score_with_gradient(latents(), PROMPTS, METADATA, "here", separately=True)
    assert sizes == [2, 1]
    assert scored.gradient.shape == (3, 2, *SHAPE)
    torch.testing.assert_close(scored.gradient[:, 0], -scored.gradient[:, 1])
    total = scorer.score_with_gradient(latents(), PROMPTS, METADATA, "here").gradient
    torch.testing.assert_close(total, 3 * scored.gradient[:, 0] + scored.gradient[:, 1])


def test_samples_without_a_reward_have_no_gradient():
    def some(images, prompts, metadata):
        return torch.where(torch.tensor([True, False, True]), brightness(images, prompts, metadata), torch.nan)

    scored = tiny_run(reward=some).scorer.score_with_gradient(latents(), PROMPTS, METADATA, "here")
    assert torch.isnan(scored.result.total).tolist() == [False, True, False]
    assert [bool(row.any()) for row in scored.gradient] == [True, False, True]


def test_wrong_gradients_are_errors():
    def infinite(images, prompts, metadata):
        return (images - images.detach()).sum((1, 2, 3)).sqrt()

    with pytest.raises(
        RewardError, match=r"reward infinite: its gradient .* not finite for 3 of 3 samples \(in here, prompts \['a'"
    ):
        tiny_run(reward=infinite).scorer.score_with_gradient(latents(), PROMPTS, METADATA, "here")
    with pytest.raises(NonDifferentiableRewardError, match="estimator='rlr_black_box'"):
        tiny_run(reward=lambda i, p, m: i.detach().mean((1, 2, 3))).scorer.score_with_gradient(latents(), PROMPTS, METADATA, "here")


def test_a_black_box_in_a_sum_is_found():
    """The sum has a graph, but the first-order steps would miss this part."""

    def black(images, prompts, metadata):
        return [1.0] * 3

    with pytest.raises(NonDifferentiableRewardError, match="'black'"):
        tiny_run(reward=[brightness, black]).scorer.score_with_gradient(latents(), PROMPTS, METADATA, "here")


@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_deferred_failure_is_kept_for_later(with_gradient):
    """The other processes must not wait for this one."""

    def broken(images, prompts, metadata):
        raise ZeroDivisionError("on purpose")

    scorer = tiny_run(reward=broken).scorer
    with RolloutScoring(scorer, with_gradient=with_gradient, defer=True) as scoring:
        for _ in range(2):
            scoring.add(latents(), PROMPTS, METADATA, "here")
        assert scoring.finish() == []
    assert "on purpose" in str(scoring.failure)
    with RolloutScoring(scorer, with_gradient=with_gradient) as scoring, pytest.raises(RewardError, match="on purpose"):
        scoring.add(latents(), PROMPTS, METADATA, "here") or scoring.finish()


def test_what_is_logged_of_rewards():
    parts = torch.tensor([[1.0, math.nan], [3.0, 5.0], [math.nan, 7.0]])
    found = reward_metrics(["a", "b"], torch.tensor([2.0, 4.0, math.nan]), parts)
    expected = {"reward": 3, "reward_std": 1, "samples_dropped": 1, "rewards/a/mean": 2, "rewards/a/std": 1}
    assert found == pytest.approx(expected | {"rewards/b/mean": 6, "rewards/b/std": 1})


def test_a_rollout_with_nothing_to_learn_from_is_refused():
    rewards = tiny_run().scorer.rewards
    with pytest.raises(RewardError, match="rollout 3: all 2 rewards are NaN or None.*check the reward function brightness"):
        check_rollout(torch.full((2,), math.nan), rewards, 0, "rollout 3")
    with pytest.raises(RewardError, match=r"rollout 3: rewards from 0 to 1e\+30 are so large that their variance .* size near 1"):
        check_rollout(torch.tensor([0, 1e30, math.nan]), rewards, 0, "rollout 3")
    check_rollout(torch.tensor([0, 1e15, math.nan]), rewards, 0, "rollout 3")
