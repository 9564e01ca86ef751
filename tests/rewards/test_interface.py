"""Calling reward functions; the errors are tested through the trainer too."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rlr_trainer.rewards import RewardError, Rewards, jpeg_compressibility, jpeg_incompressibility

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
    ],
)
def test_any_numeric_form_becomes_float32(values):
    result = Rewards(lambda *batch: values)(*BATCH, differentiable=False)
    assert result.total.dtype == torch.float32
    assert result.total.tolist() == [1, 2, 3]


def test_rewards_and_metadata():
    result = Rewards(lambda *batch: ([1, 2, 3], {"note": 1}))(*BATCH, differentiable=False)
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


def test_graph_is_attached_exactly_when_asked_for():
    seen = []

    def reward(images, prompts, metadata):
        seen.append((images.requires_grad, torch.is_grad_enabled()))
        return images.mean((1, 2, 3))

    images = IMAGES.clone().requires_grad_(True)
    assert Rewards(reward)(images, *BATCH[1:], differentiable=True).total.requires_grad
    assert not Rewards(reward)(images, *BATCH[1:], differentiable=False).total.requires_grad
    assert seen == [(True, True), (False, False)]


def test_queries_are_counted():
    rewards = Rewards(jpeg_compressibility)
    for _ in range(2):
        rewards(*BATCH, differentiable=False)
    assert rewards.queries == 6


def test_errors_name_the_reward():

    def bad(*batch):
        return torch.ones(3, 1)

    with pytest.raises(RewardError, match=r"reward 'bad' returned shape \(3, 1\)"):
        Rewards(bad)(*BATCH, differentiable=False)
    with pytest.raises(TypeError, match="must be a function"):
        Rewards([3])
    with pytest.raises(ValueError, match="at least one"):
        Rewards([])


def test_jpeg_size_is_that_of_the_file():
    pixels = (IMAGES[1].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    assert jpeg_incompressibility(*BATCH)[1].item() == pytest.approx(len(buffer.getvalue()) / 1000)
    assert torch.equal(jpeg_compressibility(*BATCH), -jpeg_incompressibility(*BATCH))
    flat = torch.full((1, 3, 16, 16), 0.5)
    assert jpeg_compressibility(flat, ("a",), ({},)) > jpeg_compressibility(IMAGES[:1], ("a",), ({},))
