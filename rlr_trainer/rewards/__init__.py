"""Reward functions."""

from __future__ import annotations

from rlr_trainer.rewards.calling import RewardTimeoutError, groupwise
from rlr_trainer.rewards.compressibility import jpeg_compressibility, jpeg_incompressibility
from rlr_trainer.rewards.interface import RewardFunction, Rewards
from rlr_trainer.rewards.neural.base import NeuralReward
from rlr_trainer.rewards.neural.classifier import ClassifierScore
from rlr_trainer.rewards.neural.clip import AestheticScore, CLIPScore, HPSv2, PickScore
from rlr_trainer.rewards.neural.image_reward import ImageReward
from rlr_trainer.rewards.neural.questions import QuestionReward
from rlr_trainer.rewards.neural.weights import WeightsError
from rlr_trainer.rewards.remote.client import RemoteReward
from rlr_trainer.rewards.remote.http_client import RemoteRewardError
from rlr_trainer.rewards.remote.server import RewardServer
from rlr_trainer.rewards.values import RewardError, RewardResult

__all__ = [
    "AestheticScore",
    "CLIPScore",
    "ClassifierScore",
    "HPSv2",
    "ImageReward",
    "NeuralReward",
    "PickScore",
    "QuestionReward",
    "RemoteReward",
    "RemoteRewardError",
    "RewardError",
    "RewardFunction",
    "RewardResult",
    "RewardServer",
    "RewardTimeoutError",
    "Rewards",
    "WeightsError",
    "groupwise",
    "jpeg_compressibility",
    "jpeg_incompressibility",
]
