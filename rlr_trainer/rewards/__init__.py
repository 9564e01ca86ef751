"""Reward functions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlr_trainer.rewards.black_box import numpy_reward, pil_reward
from rlr_trainer.rewards.calling import RewardTimeoutError, groupwise
from rlr_trainer.rewards.compressibility import jpeg_compressibility, jpeg_incompressibility
from rlr_trainer.rewards.frames import FrameReward
from rlr_trainer.rewards.interface import RewardFunction, Rewards
from rlr_trainer.rewards.motion import PromptAgreement, enough_motion, motion_amount, motion_smoothness
from rlr_trainer.rewards.values import RewardError, RewardResult

if TYPE_CHECKING:
    from rlr_trainer.rewards.neural.base import NeuralReward
    from rlr_trainer.rewards.neural.classifier import ClassifierScore
    from rlr_trainer.rewards.neural.clip import AestheticScore, CLIPScore, HPSv2, PickScore
    from rlr_trainer.rewards.neural.image_reward import ImageReward
    from rlr_trainer.rewards.neural.questions import QuestionReward
    from rlr_trainer.rewards.neural.weights import WeightsError
    from rlr_trainer.rewards.remote.client import RemoteReward, RemoteRewardError
    from rlr_trainer.rewards.remote.server import RewardServer

# Module -> its public names, loaded on first use: most runs need none of them, and `remote` is an extra.
_ON_FIRST_USE = {
    "neural.base": ("NeuralReward",),
    "neural.classifier": ("ClassifierScore",),
    "neural.clip": ("AestheticScore", "CLIPScore", "HPSv2", "PickScore"),
    "neural.image_reward": ("ImageReward",),
    "neural.questions": ("QuestionReward",),
    "neural.weights": ("WeightsError",),
    "remote.client": ("RemoteReward", "RemoteRewardError"),
    "remote.server": ("RewardServer",),
}

__all__ = [
    "AestheticScore", "CLIPScore", "ClassifierScore", "FrameReward", "HPSv2", "ImageReward", "NeuralReward", "PickScore",
    "PromptAgreement", "QuestionReward", "RemoteReward", "RemoteRewardError", "RewardError", "RewardFunction", "RewardResult",
    "RewardServer", "RewardTimeoutError", "Rewards", "WeightsError", "enough_motion", "groupwise", "jpeg_compressibility",
    "jpeg_incompressibility", "motion_amount", "motion_smoothness", "numpy_reward", "pil_reward",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _ON_FIRST_USE.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'rlr_trainer.rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rlr_trainer.rewards.{module}"), name)
