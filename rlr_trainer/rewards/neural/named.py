"""Rewards by name, for the command line: `aesthetic`, `hpsv2.1:some/folder`, `classifier:some/folder:cat`. Loaded on use."""

from __future__ import annotations

from typing import Any

# Name -> (class of rlr_trainer.rewards, options of its from_pretrained).
NEURAL: dict[str, tuple[str, dict[str, Any]]] = {
    "aesthetic": ("AestheticScore", {}),
    "clip_score": ("CLIPScore", {}),
    "hpsv2": ("HPSv2", {"version": "v2.0"}),
    "hpsv2.1": ("HPSv2", {"version": "v2.1"}),
    "image_reward": ("ImageReward", {}),
    "pickscore": ("PickScore", {}),
}
CLASSIFIER = "classifier"
NAMES = (*NEURAL, CLASSIFIER)


def is_named(name: str) -> bool:
    """Whether `load_named` knows it: a name of `NAMES`, alone or followed by a colon and a source."""
    return name.partition(":")[0] in NAMES


def load_named(name: str) -> Any:
    """The reward `kind` from its published weights, `kind:source` from a folder or hub id, or `classifier:source:class`.

    Raises:
        ValueError: a classifier without a source and a class.
        WeightsError: something is missing or damaged.
    """
    from rlr_trainer import rewards

    kind, _, source = name.partition(":")
    if kind != CLASSIFIER:
        reward, options = NEURAL[kind]
        return getattr(rewards, reward).from_pretrained(*filter(None, [source]), **options)
    folder, _, target = source.rpartition(":")
    if not folder or not target:
        raise ValueError(f"reward={name!r}: must be classifier:SOURCE:CLASS, with a folder or hub id and a class's number or label")
    return rewards.ClassifierScore.from_pretrained(folder, int(target) if target.isdigit() else target)
