"""Rewards by name, for the command line: `aesthetic`, `hpsv2.1:some/folder`, `classifier:some/folder:cat`. Loaded on use."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlr_trainer.rewards.neural.classifier import ClassifierScore
from rlr_trainer.rewards.neural.clip import AestheticScore, CLIPScore, HPSv2, PickScore
from rlr_trainer.rewards.neural.image_reward import ImageReward

NEURAL: dict[str, Any] = {
    "aesthetic": AestheticScore.from_pretrained,
    "clip_score": CLIPScore.from_pretrained,
    "hpsv2": partial(HPSv2.from_pretrained, version="v2.0"),
    "hpsv2.1": partial(HPSv2.from_pretrained, version="v2.1"),
    "image_reward": ImageReward.from_pretrained,
    "pickscore": PickScore.from_pretrained,
}
CLASSIFIER = "classifier"


def is_named(name: str) -> bool:
    """Whether `load_named` knows it."""
    return name.partition(":")[0] in (*NEURAL, CLASSIFIER)


def load_named(name: str) -> Any:
    """The reward `kind` from its published weights, `kind:source` from a folder or hub id, or `classifier:source:class`."""
    kind, _, source = name.partition(":")
    if kind != CLASSIFIER:
        return NEURAL[kind](*filter(None, [source]))
    folder, _, target = source.rpartition(":")
    if not folder or not target:
        raise ValueError(f"reward={name!r}: must be classifier:SOURCE:CLASS, with a folder or hub id and a class's number or label")
    return ClassifierScore.from_pretrained(folder, int(target) if target.isdigit() else target)
