"""What a reward that is written for another caller is told, and the decorators for numpy and PIL."""

import re

import numpy as np
import pytest
import torch

from rlr_trainer.estimators.first_order import NonDifferentiableRewardError
from rlr_trainer.rewards import FrameReward, Rewards, groupwise, jpeg_compressibility, numpy_reward, pil_reward
from rlr_trainer.rewards.values import RewardError

PROMPTS, METADATA = ("a", "b"), ({}, {})


def of_images(images): ...


def of_two(images, prompts): ...


def of_four(images, prompts, metadata, extra): ...


def of_keywords(**keywords): ...


def as_grpo(prompts, completions, **kwargs): ...


def as_grpo_with_a_column(prompts, completions, answer): ...


def in_another_order(prompts, images, metadata): ...


class Module(torch.nn.Module):
    def forward(self, images): ...


@pytest.mark.parametrize(
    "function", [of_images, of_two, of_four, of_keywords, as_grpo, as_grpo_with_a_column, in_another_order, Module(), lambda x: x]
)
def test_a_reward_with_other_arguments_is_told_the_contract(function):
    with pytest.raises(TypeError, match=re.escape("three arguments by position, reward(images, prompts, metadata)")) as error:
        Rewards(function)
    assert ("GRPOTrainer's keywords" in str(error.value)) == ("grpo" in getattr(function, "__name__", ""))


def test_a_class_and_a_name_are_told_apart_from_a_reward():
    with pytest.raises(TypeError, match=re.escape("'Module' is a class: pass an instance of it, Module(...)")):
        Rewards(Module)
    with pytest.raises(TypeError, match="names of built-in rewards are the command line's"):
        Rewards("pickscore")
    Rewards([lambda images, *rest: images, lambda a, b, c, d=None: a])  # these fit


@pytest.mark.parametrize("convert", [lambda images: images.numpy(), np.asarray, lambda images: images.cpu().numpy()])
def test_numpy_under_a_plan_that_needs_a_gradient_is_told_which_plan_does_not(convert):
    def ink(images, prompts, metadata):
        return convert(images).mean((1, 2, 3))

    images = torch.rand(2, 3, 4, 4)
    assert Rewards(ink)(images, PROMPTS, METADATA, differentiable=False).total.shape == (2,)
    with pytest.raises(NonDifferentiableRewardError, match=r"^reward 'ink': it has no gradient.*estimator='rlr_black_box'"):
        Rewards(ink)(images.requires_grad_(), PROMPTS, METADATA, differentiable=True)


def test_a_reward_that_takes_tensors_for_pil_pictures_is_told_of_the_decorator():
    def grey(images, prompts, metadata):
        return [np.asarray(picture.convert("L")).mean() for picture in images]

    def wide(images, prompts, metadata):
        return [picture.size[0] for picture in images]  # a tensor's size is a method

    images = torch.rand(2, 3, 4, 6)
    for reward in (grey, wide):
        with pytest.raises(RewardError, match="rlr_trainer.rewards.pil_reward"):
            Rewards(reward)(images, PROMPTS, METADATA, differentiable=False)
    assert Rewards(pil_reward(grey)).names == ["grey"]
    total = Rewards(pil_reward(grey))(images, PROMPTS, METADATA, differentiable=False).total
    weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601, as PIL has it
    torch.testing.assert_close(total, 255 * (images * weights[:, None, None]).sum(1).mean((1, 2)), atol=1.0, rtol=0)


def test_the_decorators_hand_over_eight_bits():
    seen = {}

    def keep(images, prompts, metadata):
        seen["images"] = images
        return [0.0] * len(images)

    images = torch.tensor([0.0, 0.5, 1.3]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    Rewards(numpy_reward(keep))(images, PROMPTS, METADATA, differentiable=False)
    assert seen["images"].shape == (2, 4, 5, 3) and seen["images"].dtype == np.uint8
    assert seen["images"][0, 0, 0].tolist() == [0, 128, 255]
    Rewards(pil_reward(keep))(images[:, None], PROMPTS, METADATA, differentiable=False)
    assert [[frame.size for frame in video] for video in seen["images"]] == [[(5, 4)], [(5, 4)]]
    assert Rewards(numpy_reward(groupwise(keep)), group_size=2).needs_groups


@pytest.mark.parametrize("reward", [numpy_reward(lambda i, p, m: i), jpeg_compressibility, FrameReward(jpeg_compressibility)])
def test_what_can_never_have_a_gradient_is_known_before_it_is_called(reward):
    assert "is a black box" in Rewards(reward).without_graph()


@pytest.mark.parametrize("black_box", [jpeg_compressibility, lambda images, prompts, metadata: images.detach().mean((1, 2, 3))])
def test_a_list_with_one_black_box_is_a_black_box(black_box):
    def ink(images, prompts, metadata):
        return images.mean((1, 2, 3))

    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    rewards = Rewards([ink, black_box])
    with pytest.raises(NonDifferentiableRewardError, match=r"estimator='rlr_black_box'.*makes the whole list a black box"):
        rewards(images, PROMPTS, METADATA, differentiable=True)
    assert rewards(images, PROMPTS, METADATA, differentiable=False).total.shape == (2,)
    assert "whole list" not in Rewards(ink).of_list
