"""Reward functions."""

from rlr_trainer.rewards.compressibility import jpeg_compressibility, jpeg_incompressibility
from rlr_trainer.rewards.interface import RewardError, RewardFunction, RewardResult, Rewards

__all__ = [
    "RewardError",
    "RewardFunction",
    "RewardResult",
    "Rewards",
    "jpeg_compressibility",
    "jpeg_incompressibility",
]
