"""Reward functions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlr_trainer.rewards.calling import RewardTimeoutError, groupwise
from rlr_trainer.rewards.compressibility import jpeg_compressibility, jpeg_incompressibility
from rlr_trainer.rewards.interface import RewardError, RewardFunction, RewardResult, Rewards

if TYPE_CHECKING:
    from rlr_trainer.rewards.neural.aesthetic import AestheticScore
    from rlr_trainer.rewards.neural.base import NeuralReward
    from rlr_trainer.rewards.neural.classifier import ClassifierScore
    from rlr_trainer.rewards.neural.clip import CLIPScore, HPSv2, PickScore
    from rlr_trainer.rewards.neural.image_reward import ImageReward
    from rlr_trainer.rewards.neural.questions import QuestionReward
    from rlr_trainer.rewards.neural.weights import WeightsError
    from rlr_trainer.rewards.remote.client import RemoteReward, RemoteRewardError
    from rlr_trainer.rewards.remote.server import RewardServer

# Public name -> module. Loaded on first use: most runs need none of them.
_ON_FIRST_USE = {
    "AestheticScore": "rlr_trainer.rewards.neural.aesthetic",
    "CLIPScore": "rlr_trainer.rewards.neural.clip",
    "ClassifierScore": "rlr_trainer.rewards.neural.classifier",
    "HPSv2": "rlr_trainer.rewards.neural.clip",
    "ImageReward": "rlr_trainer.rewards.neural.image_reward",
    "NeuralReward": "rlr_trainer.rewards.neural.base",
    "PickScore": "rlr_trainer.rewards.neural.clip",
    "QuestionReward": "rlr_trainer.rewards.neural.questions",
    "RemoteReward": "rlr_trainer.rewards.remote.client",
    "RemoteRewardError": "rlr_trainer.rewards.remote.client",
    "RewardServer": "rlr_trainer.rewards.remote.server",
    "WeightsError": "rlr_trainer.rewards.neural.weights",
}

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


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'rlr_trainer.rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
