"""Rewards of motion: their formulas, their gradients, and what wins them."""

import math

import pytest
import tiny_rewards
import torch

from rlr_trainer.rewards import CLIPScore, PromptAgreement, RewardError, Rewards, enough_motion, motion_amount, motion_smoothness
from rlr_trainer.rewards.motion import interpolation_error, mean_frame_difference, soft_minimum

PROMPTS, ROWS = ("a", "b"), ({}, {})


def clips(frames=5, size=6, seed=0, videos=2, dtype=torch.float32):
    return torch.rand(videos, frames, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def frozen():
    return clips(1).expand(-1, 5, -1, -1, -1)


def sliding(step=1, frames=8, size=16):
    """A bright square that moves by `step` pixels from frame to frame."""
    video = torch.zeros(2, frames, 3, size, size)
    for number in range(frames):
        video[:, number, :, 4:8, number * step % size : number * step % size + 4] = 1
    return video


def call(reward, videos):
    return reward(videos, PROMPTS, ROWS)


def test_the_formulas_against_loops():
    videos = clips(dtype=torch.float64)
    steps = [(videos[:, f + 1] - videos[:, f]).abs().mean((1, 2, 3)) for f in range(4)]
    torch.testing.assert_close(mean_frame_difference(videos), sum(steps) / 4)
    bends = [(videos[:, f] - (videos[:, f - 1] + videos[:, f + 1]) / 2).abs().mean((1, 2, 3)) for f in range(1, 4)]
    torch.testing.assert_close(interpolation_error(videos), sum(bends) / 3)
    torch.testing.assert_close(call(motion_amount, videos), mean_frame_difference(videos))
    torch.testing.assert_close(call(motion_smoothness, videos), 1 - interpolation_error(videos))
    amount = mean_frame_difference(videos)
    torch.testing.assert_close(call(enough_motion(0.9), videos), amount / 0.9)
    assert call(enough_motion(0.1), videos).tolist() == [1.0, 1.0]


def test_independent_noise_differs_by_a_third():
    """E|U - V| = 1/3 of two uniform numbers; with variance 1/18 and 3 * 64 * 64 of them per pair, dependent between pairs that share a frame."""
    noise = clips(9, size=64, videos=1)
    assert mean_frame_difference(noise).item() == pytest.approx(1 / 3, abs=5 * math.sqrt(2 / 18 / (3 * 64 * 64 * 8)))


def test_the_soft_minimum_lies_between_the_least_value_and_the_mean():
    values = torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]], dtype=torch.float64, requires_grad=True)
    found = soft_minimum(values, 2.0)
    expected = -2.0 * math.log((math.exp(-0.5) + math.exp(-1) + math.exp(-3)) / 3)
    assert found.tolist() == pytest.approx([expected, 3.0], rel=1e-12)
    (weights,) = torch.autograd.grad(found.sum(), values)
    torch.testing.assert_close(weights, torch.softmax(-values.detach() / 2.0, 1))
    assert soft_minimum(values, 1e-3)[0].item() == pytest.approx(1.0, abs=2e-3)
    assert soft_minimum(values, 1e4)[0].item() == pytest.approx(3.0, abs=1e-3)


@pytest.mark.parametrize("reward", [motion_amount, motion_smoothness, enough_motion(0.8)], ids=lambda reward: reward.__name__)
def test_the_gradient_is_the_functions(reward):
    """In float64 against central differences along random directions."""
    videos = clips(dtype=torch.float64).requires_grad_()
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((call(reward, videos) * weight).sum(), videos)
    assert (gradient.flatten(2).abs().amax(2) > 0).all()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(videos.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = ((call(reward, videos + sign * 1e-7 * direction) * weight).sum() for sign in (1, -1))
        assert (gradient * direction).sum().item() == pytest.approx(((up - down) / 2e-7).item(), rel=1e-4, abs=1e-6)


def test_what_wins_each_reward_is_what_its_docstring_says():
    flicker = torch.zeros(2, 8, 3, 16, 16)
    flicker[:, ::2] = 1
    fade = torch.linspace(0, 1, 8)[None, :, None, None, None].expand(2, -1, 3, 16, 16)
    still = frozen()
    slow, fast = sliding(1), sliding(2)
    amounts = [call(motion_amount, video)[0].item() for video in (still, slow, fast, flicker)]
    assert amounts[0] == 0 and amounts[3] == 1 and amounts == sorted(amounts)
    named = {"still": still, "fade": fade, "slow": slow, "flicker": flicker}
    smooth = {name: call(motion_smoothness, video)[0].item() for name, video in named.items()}
    assert smooth["still"] == 1 and smooth["fade"] == pytest.approx(1) and smooth["flicker"] == 0
    assert smooth["flicker"] < smooth["slow"] < 1
    enough = enough_motion(amounts[1])
    assert call(enough, still)[0] == 0 and call(enough, slow)[0].item() == pytest.approx(1) and call(enough, flicker)[0] == 1
    # together: a video that moves smoothly beats one that is frozen, and one that flickers
    total = {name: (call(enough, named[name]) + call(motion_smoothness, named[name]))[0] for name in ("still", "slow", "flicker")}
    assert total["slow"] == max(total.values())


def test_agreement_with_the_prompt_asks_every_frame(tmp_path):
    reward = CLIPScore.from_pretrained(tiny_rewards.clip_folder(tmp_path))
    agreement = PromptAgreement(reward, temperature=0.5)
    videos = clips(4, size=32).requires_grad_()
    prompts = tiny_rewards.PROMPTS[:2]
    each = torch.stack([reward(videos[:, f], prompts, ROWS) for f in range(4)], 1)
    found = agreement(videos, prompts, ROWS)
    torch.testing.assert_close(found, soft_minimum(each, 0.5), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), videos)
    assert (gradient.flatten(2).abs().amax(2) > 0).all()
    permuted = agreement(videos[:, [2, 0, 3, 1]], prompts, ROWS)
    torch.testing.assert_close(permuted, found, rtol=1e-4, atol=1e-4)  # it does not see the order, as its docstring says
    assert agreement.__name__ == "prompt_agreement"
    with pytest.raises(ValueError, match="temperature=0: must be a finite number above 0"):
        PromptAgreement(reward, temperature=0)


def test_a_still_picture_has_no_motion_to_score():
    def brightness(images, prompts, metadata):
        return images.mean((1, 2, 3))

    for reward, least in ((motion_amount, 2), (motion_smoothness, 3), (enough_motion(0.1), 2), (PromptAgreement(brightness), 2)):
        for images in (clips()[:, 0], clips()[:, : least - 1]):
            with pytest.raises(
                RewardError, match=rf"images has the shape .*, but must be videos \[B, F, 3, H, W\] of at least {least}"
            ):
                call(reward, images)
            with pytest.raises(RewardError, match="must be videos"):
                Rewards(reward)(images, PROMPTS, ROWS, differentiable=False)
    for amount in (0, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            enough_motion(amount)
