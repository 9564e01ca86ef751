"""Picture rewards on videos: which frames, what becomes of their scores, and gradients through some of them."""

import asyncio
import itertools
import math

import pytest
import tiny_rewards
import torch

from rlr_trainer.cli.settings import load_reward
from rlr_trainer.digits.rewards import digit_reward, ink
from rlr_trainer.rewards import (
    AestheticScore,
    ClassifierScore,
    CLIPScore,
    FrameReward,
    HPSv2,
    ImageReward,
    PickScore,
    PromptAgreement,
    RewardError,
    Rewards,
    groupwise,
    jpeg_compressibility,
    jpeg_incompressibility,
)
from rlr_trainer.rewards.frames import even_frames, random_frames, take_frames

PROMPTS = tiny_rewards.PROMPTS[:2]
ROWS = ({"animal": "dog"}, {"animal": "owl"})


def clips(frames=5, size=32, seed=0, videos=2):
    return torch.rand(videos, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def contrast(images, prompts, metadata):
    return images.square().mean((1, 2, 3))


BUILT_IN = {
    "ink": lambda folder: ink,
    "digit": lambda folder: digit_reward(7),
    "jpeg_compressibility": lambda folder: jpeg_compressibility,
    "jpeg_incompressibility": lambda folder: jpeg_incompressibility,
    "aesthetic": lambda folder: AestheticScore.from_pretrained(tiny_rewards.aesthetic_folder(folder)),
    "classifier": lambda folder: ClassifierScore.from_pretrained(tiny_rewards.classifier_folder(folder), target_key="animal"),
    "clip_score": lambda folder: CLIPScore.from_pretrained(tiny_rewards.clip_folder(folder), batch_size=3),
    "hpsv2.1": lambda folder: HPSv2.from_pretrained(tiny_rewards.hpsv2_folder(folder)),
    "image_reward": lambda folder: ImageReward.from_pretrained(
        tiny_rewards.image_reward_folder(folder), batch_size=4, recompute=True
    ),
    "pickscore": lambda folder: PickScore.from_pretrained(tiny_rewards.clip_folder(folder)),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_reward_scores_a_video_by_the_mean_of_its_frames(name, tmp_path):
    """With the gradient of that mean, each frame against the prompt and metadata of its own video."""
    reward = BUILT_IN[name](tmp_path / "weights")
    videos = clips().requires_grad_()
    found = reward(videos, PROMPTS, ROWS)
    expected = torch.stack([reward(videos[:, number], PROMPTS, ROWS) for number in range(5)], 1).mean(1)
    assert found.shape == (2,)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if not name.startswith("jpeg"):
        weight = torch.tensor([1.0, -2.0])
        (gradient,) = torch.autograd.grad((found * weight).sum(), videos)
        (right,) = torch.autograd.grad((expected * weight).sum(), videos)
        assert (right.flatten(2).abs().amax(2) > 0).all()  # of every frame
        torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())


def test_even_frames_reach_from_the_first_to_the_last():
    assert even_frames(5, 16) == [0, 4, 8, 11, 15]
    assert even_frames(1, 9) == [4] and even_frames(2, 9) == [0, 8]
    for total in range(1, 30):
        for count in range(2, total + 1):
            chosen = even_frames(count, total)
            assert chosen[0] == 0 and chosen[-1] == total - 1
            gaps = {b - a for a, b in itertools.pairwise(chosen)}
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_random_frames_are_different_and_every_set_is_as_likely():
    """1/10 for each of the ten pairs of five frames: within 5 standard errors of 20,000 draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = random_frames(20_000, 2, 5)
    assert (drawn[:, 0] < drawn[:, 1]).all()
    counts = torch.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25)
    counts = counts[counts > 0]
    assert len(counts) == 10
    assert (counts / 20_000 - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / 20_000)


@pytest.mark.parametrize("combine", ["mean", "min"])
def test_chosen_frames_are_combined(combine):
    videos = clips(9)
    reward = FrameReward(brightness, 3, combine=combine)
    each = videos[:, [0, 4, 8]].mean((2, 3, 4))
    torch.testing.assert_close(reward(videos, PROMPTS, ROWS), each.mean(1) if combine == "mean" else each.amin(1))
    torch.testing.assert_close(FrameReward(brightness)(videos, PROMPTS, ROWS), videos.mean((1, 2, 3, 4)))
    torch.testing.assert_close(reward(videos[:, 0], PROMPTS, ROWS), brightness(videos[:, 0], PROMPTS, ROWS))  # pictures
    assert reward.__name__ == "brightness"


def test_the_mean_of_random_frames_is_unbiased_and_so_is_its_gradient():
    """Within 5 standard errors over 4,000 draws; the mean of the first frames alone, or of the even ones, is not."""
    video = clips(6, size=2, videos=1)
    many = video.expand(4000, -1, -1, -1, -1).clone().requires_grad_()
    exact = video.square().mean()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = FrameReward(contrast, 2, choice="random")(many, ("",) * 4000, ({},) * 4000)
    (gradient,) = torch.autograd.grad(values.sum(), many)
    (right,) = torch.autograd.grad(contrast_of_all(many), many)

    def is_unbiased(samples, truth):
        error = samples.std(0) / len(samples) ** 0.5
        return bool(((samples.mean(0) - truth).abs() <= 5 * error).all())

    assert is_unbiased(values.detach(), exact)
    assert is_unbiased(gradient, right[0])
    assert not is_unbiased(values.detach(), video[:, :2].square().mean())
    assert not is_unbiased(gradient * 2 / 6, right[0])  # weighted as if all frames had been scored


def contrast_of_all(videos):
    return videos.square().mean((1, 2, 3, 4)).sum()


def test_gradient_frames_keep_the_value_and_an_unbiased_gradient():
    """The value is that of all scored frames; a graph is kept of two of them; over 4,000 draws the gradient is that of all."""
    video = clips(6, size=2, videos=1)
    many = video.expand(4000, -1, -1, -1, -1).clone().requires_grad_()
    graphs = []

    def watched(images, prompts, metadata):
        graphs.append((len(images), torch.is_grad_enabled()))
        return contrast(images, prompts, metadata)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = FrameReward(watched, gradient_frames=2)(many, ("",) * 4000, ({},) * 4000)
    assert graphs == [(6 * 4000, False), (2 * 4000, True)]
    torch.testing.assert_close(values, many.square().mean((1, 2, 3, 4)))
    (gradient,) = torch.autograd.grad(values.sum(), many)
    assert ((gradient.flatten(2).abs().amax(2) > 0).sum(1) == 2).all()
    (right,) = torch.autograd.grad(contrast_of_all(many), many)
    error = gradient.std(0) / 4000**0.5
    assert ((gradient.mean(0) - right[0]).abs() <= 5 * error).all()
    assert not ((gradient.mean(0) * 2 / 6 - right[0]).abs() <= 5 * error).all()
    with torch.no_grad():
        graphs.clear()
        FrameReward(watched, gradient_frames=2)(many, ("",) * 4000, ({},) * 4000)
    assert graphs == [(6 * 4000, False)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_the_draws_depend_on_the_seed_alone(asynchronous, batch_size):
    """Not on how the videos are divided into calls, nor on when a thread comes to a call."""
    videos = clips(40, size=2, videos=6)
    number = videos.new_tensor(range(40))[None, :, None, None, None]

    def run(seed, **how):
        rewards = Rewards(FrameReward(brightness, 1, choice="random"), **how)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return rewards(number.expand_as(videos), ("",) * 6, ({},) * 6, differentiable=False).total

    expected = run(0)
    assert len(expected.unique()) > 3
    assert torch.equal(run(0, asynchronous=asynchronous, workers=3, batch_size=batch_size), expected)
    assert not torch.equal(run(1), expected)


def test_every_form_of_an_answer(caplog):
    """Lists, notes with an entry per frame, coroutines; a frame without a reward leaves its video without one."""
    videos = clips(3)

    def with_notes(images, prompts, metadata):
        assert len({id(row) for row in metadata}) == len(images)
        for row, prompt in zip(metadata, prompts, strict=True):
            row["seen"] = prompt
        return images.mean((1, 2, 3)).tolist(), {"prompts": list(prompts), "all": "one"}

    values, notes = FrameReward(with_notes)(videos, PROMPTS, ROWS)
    torch.testing.assert_close(values, videos.mean((1, 2, 3, 4)))
    assert notes == {"prompts": [[PROMPTS[0]] * 3, [PROMPTS[1]] * 3], "all": "one"}
    assert "seen" not in ROWS[0]

    async def later(images, prompts, metadata):
        await asyncio.sleep(0)
        return brightness(images, prompts, metadata)

    torch.testing.assert_close(FrameReward(later)(videos, PROMPTS, ROWS), values)
    some = FrameReward(lambda images, prompts, metadata: [None, 1.0, 1.0, 2.0, 3.0, 4.0])
    assert some(videos, PROMPTS, ROWS).isnan().tolist() == [True, False]
    result = Rewards(some)(videos, PROMPTS, ROWS, differentiable=False)
    assert result.total.isnan().tolist() == [True, False] and result.total[1] == 3.0


def test_impossible_frames_are_refused():
    for options, message in (
        ({"num_frames": 0}, "num_frames=0: must be at least 1"),
        ({"choice": "first"}, "choice='first': must be one of even, random"),
        ({"combine": "max"}, "combine='max': must be one of mean, min"),
        ({"gradient_frames": 2, "combine": "min"}, "only a mean has an unbiased gradient"),
        ({"num_frames": 2, "gradient_frames": 3}, "must be at most num_frames=2"),
    ):
        with pytest.raises(ValueError, match=message):
            FrameReward(brightness, **options)
    with pytest.raises(RewardError, match="reward 'brightness': num_frames=6, but the videos have 5 frames"):
        FrameReward(brightness, 6)(clips(), PROMPTS, ROWS)
    with pytest.raises(TypeError, match="group-wise"):
        FrameReward(groupwise(lambda images, prompts, metadata: [0.0] * len(images)))
    with pytest.raises(RewardError, match=r"reward 'batch_mean' returned shape \(\) for a batch of 10"):
        FrameReward(lambda images, prompts, metadata: images.mean(), name="batch_mean")(clips(), PROMPTS, ROWS)


def test_frames_are_taken_with_a_graph():
    videos = clips(4, size=2).requires_grad_()
    taken = take_frames(videos, torch.tensor([[0, 3], [2, 1]]))
    assert torch.equal(taken[1], videos[1, [2, 1]])
    taken.sum().backward()
    assert videos.grad.amax((2, 3, 4)).tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]


def test_names_of_the_command_line(tmp_path):
    reward = load_reward("frames:8:random:min:ink")
    assert (reward.reward, reward.num_frames, reward.choice) == (ink, 8, "random")
    assert reward.combine(torch.tensor([[1.0, 3.0]])).tolist() == [1.0]
    folder = tiny_rewards.clip_folder(tmp_path)
    reward = load_reward(f"frames:mean:4:pickscore:{folder}")
    assert isinstance(reward.reward, PickScore) and (reward.num_frames, reward.choice) == (4, "even")
    agreement = load_reward(f"prompt_agreement:clip_score:{folder}")
    assert isinstance(agreement, PromptAgreement) and isinstance(agreement.reward, CLIPScore)
    moving = clips(3).cumsum(1) / 3
    for name in ("motion_amount", "motion_smoothness", "enough_motion:0.05"):
        assert load_reward(name)(moving, PROMPTS, ROWS).shape == (2,)
    for name, message in (
        ("frames:ink", "must be frames:WORDS:REWARD"),
        ("frames:8", "must be frames:WORDS:REWARD"),
        ("frames:8:9:ink", "each at most once"),
        ("frames:8:nothing", "reward='nothing': must be"),
        ("enough_motion", "must be enough_motion:AMOUNT"),
        ("enough_motion:2", "amount=2.0: must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(name)
