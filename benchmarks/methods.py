"""The benchmark's methods: options of `RLRConfig`, or one of TRL's trainers."""

from __future__ import annotations

import dataclasses
from typing import Any

LEARNING_RATES = (5e-3, 1e-2)  # 2e-3 was the slowest of three with all methods that were tried at 32 pictures per update


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        options: of `RLRConfig`.
        flow_options: further ones on the flow models, which sample with little noise at the end and none in the last step.
        trl: name of TRL's trainer, which runs in its place; on the Stable Diffusion model alone.
        needs_gradient: whether the reward must be differentiable.
        batch: pictures per update.
        flow_batch: on digits-flow, where it differs.
        tuned_as: the method whose learning rate this one takes; None if it has its own.
        frames: of a video, drawn at random, that the reward is taken on in training; None: all.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    flow_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    trl: str | None = None
    needs_gradient: bool = False
    batch: int = 16
    flow_batch: int | None = None
    tuned_as: str | None = None
    frames: int | None = None

    def batch_on(self, model: str) -> int:
        """Pictures per update on a model."""
        return self.flow_batch or self.batch if model == "digits-flow" else self.batch


METHODS = {
    "trl_ddpo": Method(trl="DDPOTrainer"),
    "trl_alignprop": Method(trl="AlignPropTrainer", needs_gradient=True),
    "ddpo": Method({"estimator": "ddpo"}, {"silent_estimator": "none"}),
    # "keep" gives the same gradients bit for bit, without a second forward pass;
    # on digits-flow, seed 100: 323 queries to a judged 0.9 with 32 (1e-2), 435 (5e-3) and 893 (1e-2, it was left again) with 16
    "rlr_black_box": Method({"estimator": "rlr_black_box", "recompute": "keep"}, flow_batch=32),
    "rlr": Method({"estimator": "rlr", "recompute": "keep"}, {"fo_steps": 5, "noise_steps": 5}, needs_gradient=True),
    "draft": Method({"estimator": "draft"}, needs_gradient=True),
    # of clips: as VADER, on a random subset of frames
    "vader": Method({"estimator": "draft"}, needs_gradient=True, frames=3),
    "awm": Method({"estimator": "awm"}, batch=32),  # at 16 its tuning seed takes 1,135 queries (5e-3) or does not arrive (1e-2)
    "nft": Method({"estimator": "nft"}),
    "flow_grpo": Method({"estimator": "flow_grpo"}),
    "mixgrpo": Method({"estimator": "mixgrpo"}),
    # the ablation of the RLR paper: without ZO, without HO, without both
    "rlr_paper": Method({"estimator": "rlr_paper"}, needs_gradient=True),
    "rlr_paper_without_zo": Method({"estimator": "rlr_paper", "rest_estimator": "none"}, needs_gradient=True, tuned_as="rlr_paper"),
    "rlr_paper_without_ho": Method({"estimator": "rlr_paper", "ho_length": 0}, needs_gradient=True, tuned_as="rlr_paper"),
    "rlr_paper_without_both": Method(
        {"estimator": "rlr_paper", "ho_length": 0, "rest_estimator": "none"}, needs_gradient=True, tuned_as="rlr_paper"
    ),
}
