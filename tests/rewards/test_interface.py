"""Calling reward functions; the errors are tested through the trainer too."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint

from rlr_trainer.estimators import NonDifferentiableRewardError
from rlr_trainer.rewards import RewardError, Rewards, groupwise, jpeg_compressibility, jpeg_incompressibility

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCH = (IMAGES, ("a", "b", "c"), ({}, {}, {}))


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1, 2, 3]),
        np.array([1.0, 2.0, 3.0]),
        [1, 2.0, np.float64(3)],
        torch.tensor([1.0, 2, 3]).half(),
        [torch.tensor(1.0), 2, torch.tensor([3.0])],
        torch.tensor([[1.0], [2.0], [3.0]]),
        np.array([[1], [2], [3]]),
    ],
)
def test_any_numeric_form_becomes_float32(values):
    result = Rewards(lambda *batch: values)(*BATCH, differentiable=False)
    assert result.total.dtype == torch.float32
    assert result.total.tolist() == [1, 2, 3]


def test_rewards_and_metadata():
    rewards = Rewards(lambda *batch: ([1, 2, 3], {"note": 1}))
    result = rewards(*BATCH, differentiable=False)
    assert rewards.queries == 3
    assert result.metadata == {"note": 1}
    several = Rewards([lambda *batch: ([1, 2, 3], "x"), lambda *batch: [0, 0, 1]])(*BATCH, differentiable=False)
    assert list(several.parts) == ["<lambda>", "<lambda>_2"]
    assert several.metadata == {"<lambda>": "x", "<lambda>_2": {}}


def test_a_reward_that_does_not_apply_leaves_the_others():
    def some(*batch):
        return [1.0, None, float("nan")]

    def other(*batch):
        return [10.0, 20.0, None]

    total = Rewards([some, other], [2.0, 1.0])(*BATCH, differentiable=False).total
    assert total[:2].tolist() == [12.0, 20.0]
    assert torch.isnan(total[2])


@pytest.mark.parametrize("options", [{}, {"timeout": 5.0}, {"asynchronous": True}], ids=str)
def test_rewards_are_computed_in_full_precision_within_autocast_too(options):
    """A diagnosis calls them there, training does not: both must see the same numbers."""

    def reward(images, prompts, metadata):
        return (images.flatten(1) @ torch.ones(768, 1))[:, 0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = Rewards(reward, **options)(*BATCH, differentiable=False).total
    torch.testing.assert_close(total, IMAGES.sum((1, 2, 3)))


def detached(images, prompts, metadata):
    """A graph, but only to a network's own parameters."""
    return torch.nn.Linear(3, 1)(images.detach().mean((2, 3)))[:, 0]


def test_each_of_several_rewards_must_have_a_graph_from_the_pictures():
    """The pictures have one exactly when it is asked for, and so has the result."""
    seen = []

    def reward(images, prompts, metadata):
        seen.append((images.requires_grad, torch.is_grad_enabled()))
        return images.mean((1, 2, 3))

    images = IMAGES.clone().requires_grad_(True)
    assert Rewards(reward)(images, *BATCH[1:], differentiable=True).total.requires_grad
    rewards = Rewards([reward, detached], batch_size=2)
    assert not rewards(images, *BATCH[1:], differentiable=False).total.requires_grad
    assert seen == [(True, True), (False, False), (False, False)]
    with pytest.raises(NonDifferentiableRewardError, match="reward 'detached'"):
        rewards(images, *BATCH[1:], differentiable=True)


def test_a_graph_is_found_however_the_reward_goes_about_its_pictures():
    def in_place_before(images, prompts, metadata):
        return images.clamp_(0.1, 0.9).mean((1, 2, 3))

    def in_place_after(images, prompts, metadata):
        values = images.sum((1, 2, 3))
        images.zero_()
        return values

    def recomputed(images, prompts, metadata):
        return checkpoint(lambda x: x.square().mean((1, 2, 3)), images, use_reentrant=True)

    for function in (in_place_before, in_place_after, recomputed):
        latents = IMAGES.clone().requires_grad_(True)
        pictures = latents * 1.0
        result = Rewards([function, lambda i, p, m: 2 * i.sum((1, 2, 3))], batch_size=2)(pictures, *BATCH[1:], differentiable=True)
        assert torch.equal(pictures, IMAGES)
        result.values[1].sum().backward(retain_graph=True)
        assert torch.equal(latents.grad, torch.full_like(IMAGES, 2))
        latents.grad = None
        result.values[0].sum().backward()
        assert latents.grad.flatten(1).abs().max(1).values.min() > 0


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"asynchronous": True, "workers": 3}, {"timeout": 5.0}], ids=str)
def test_every_call_gets_pictures_and_metadata_of_its_own(options):
    seen = []

    def edits(images, prompts, metadata):
        values = images.mean((1, 2, 3))
        images.mul_(0).add_(9)
        seen.extend(row.pop("key") for row in metadata)
        return values

    images, rows = IMAGES.clone(), tuple({"key": i} for i in range(3))
    for given in (images, images.expand(3, 3, 16, 16)):
        rewards = Rewards([edits, edits, groupwise(lambda i, p, m: edits(i, p, m))], group_size=3, **options)
        result = rewards(given, ("a",) * 3, rows, differentiable=False)
        for values in result.parts.values():
            torch.testing.assert_close(values, IMAGES.mean((1, 2, 3)))
    assert sorted(seen) == [0] * 6 + [1] * 6 + [2] * 6
    assert torch.equal(images, IMAGES)
    assert rows == tuple({"key": i} for i in range(3))


def named(name):
    def reward(images, prompts, metadata):
        return [1.0] * len(prompts)

    reward.__name__ = name
    return reward


@pytest.mark.parametrize(
    ("given", "unique"),
    [
        (["score_2", "score", "score"], ["score_2", "score", "score_3"]),
        (["score", "score", "score_2"], ["score", "score_3", "score_2"]),
        (["digit_seven", "digit"], ["digit_seven", "digit"]),
    ],
)
def test_names_are_made_unique(given, unique):
    rewards = Rewards([named(name) for name in given])
    assert rewards.names == unique
    assert list(rewards(*BATCH, differentiable=False).parts) == unique


def test_a_reward_of_weight_0_is_only_logged():
    def some(*batch):
        return [1.0, None, 3.0]

    result = Rewards([some, named("logged")], [2.0, 0.0])(*BATCH, differentiable=False)
    assert result.total[[0, 2]].tolist() == [2.0, 6.0]
    assert torch.isnan(result.total[1])  # and not 0 * 1
    assert result.parts["logged"].tolist() == [1.0, 1.0, 1.0]
    assert Rewards([named("a"), named("b")], [0.0, 0])(*BATCH, differentiable=False).total.tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pictures_that_are_not_finite_are_no_missing_rewards(value):
    """As of a decoder in float16 that overflows. A mean of NaN would say "not applicable", and a JPEG file shows black."""
    images = IMAGES.clone()
    images[1, 0, 3, 3] = value
    for reward in (jpeg_compressibility, lambda i, p, m: i.mean((1, 2, 3))):
        with pytest.raises(FloatingPointError, match=r"1 of 3 pictures .*non-finite values \(in batch 5, on 1 prompts: 'b'\)"):
            Rewards(reward)(images, *BATCH[1:], differentiable=False, where="batch 5")


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_picture_that_is_not_finite_is_skipped_alone(differentiable, caplog):
    """One NaN ended the run, whatever on_error said. The reward sees a black picture in its place, and the others as they are."""
    images, seen = IMAGES.clone(), []
    images[1, 0, 3, 3] = float("nan")
    images.requires_grad_(differentiable)

    def reward(batch, prompts, metadata):
        seen.append(batch.detach())
        return batch.mean((1, 2, 3))

    result = Rewards([reward, reward], on_error="skip")(images, *BATCH[1:], differentiable=differentiable)
    assert torch.isnan(result.total).tolist() == [False, True, False]
    assert torch.isnan(result.values).tolist() == [[False, True, False]] * 2
    assert all(torch.equal(batch[[0, 2]], IMAGES[[0, 2]]) and not batch[1].any() for batch in seen)
    assert "the decoder failed: FloatingPointError: 1 of 3 pictures" in caplog.text
    assert "1 samples are dropped" in caplog.text


def test_a_group_with_a_picture_that_is_not_finite_is_skipped():
    images = torch.rand(4, 3, 4, 4)
    images[3] = float("nan")
    ranks = groupwise(lambda batch, prompts, metadata: torch.arange(2.0))
    result = Rewards(ranks, group_size=2, on_error="skip")(images, ("a", "a", "b", "b"), ({},) * 4, differentiable=False)
    assert torch.isnan(result.total).tolist() == [False, False, True, True]


def test_what_cannot_be():
    for returned, message in (
        (torch.ones(3, 2), r"reward 'bad' returned shape \(3, 2\)"),
        ([torch.ones(2)] * 3, "reward 'bad' returned list"),
        (["1", 2, 3], r"reward 'bad' returned list \(\['1', 2, 3\]\): must be"),
        (object(), "reward 'bad' returned object"),
        (torch.ones(3) * 1j, "reward 'bad' returned Tensor .* 3 real numbers"),
        ([1, 2, float("inf")], "reward 'bad' returned an infinite value"),
    ):

        def bad(*batch, returned=returned):
            return returned

        with pytest.raises(RewardError, match=message):
            Rewards(bad)(*BATCH, differentiable=False)
    with pytest.raises(TypeError, match="must be a function"):
        Rewards([3])
    with pytest.raises(TypeError, match=r"reward_function=\[\]: must be"):
        Rewards([])
    with pytest.raises(ValueError, match="on_error='ignore': must be one of raise, skip"):
        Rewards(bad, on_error="ignore")
    for weights in ([1.0, float("nan")], [1.0, float("inf")], [1.0, "1"], [1.0, None], [1.0]):
        with pytest.raises(ValueError, match=r"reward_weights=\[.*must be 2 finite numbers"):
            Rewards([bad, bad], weights)


def test_jpeg_size_is_that_of_the_file():
    pixels = (IMAGES[1].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    assert jpeg_incompressibility(*BATCH)[1].item() == pytest.approx(len(buffer.getvalue()) / 1000)
    assert torch.equal(jpeg_compressibility(*BATCH), -jpeg_incompressibility(*BATCH))
    flat = torch.full((1, 3, 16, 16), 0.5)
    assert jpeg_compressibility(flat, ("a",), ({},)) > jpeg_compressibility(IMAGES[:1], ("a",), ({},))
