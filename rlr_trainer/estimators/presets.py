"""Named plans, and how their authors sample and normalize."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from rlr_trainer.estimators.forward_process import ForwardProcess


def _share(share: float, num_steps: int) -> int:
    return max(1, math.ceil(share * num_steps))


@dataclasses.dataclass(frozen=True)
class Preset:
    """A plan by name. A user's own options come before all that it says.

    Attributes:
        plan: number of steps T -> options of `EstimatorPlan`.
        sampling: T -> other options of `RLRConfig`: how the chain is sampled, the weight of the reference policy, the clip range.
        advantage, adv_clip_max: the defaults of these options.
    """

    plan: Callable[[int], dict[str, Any]]
    sampling: Callable[[int], dict[str, Any]] = lambda t: {}
    advantage: str = "leave_one_out"
    adv_clip_max: float | None = None


def _left_out(num_steps: int) -> dict[str, Any]:
    """Likelihood ratio where there is noise; the share of the other steps is left out."""
    return {"rest_estimator": "lr", "silent_estimator": "none"}


_FLOW_SDE = {"sampler": "flow_sde"}  # at its default level, 0.7

# "flow_grpo" is arXiv:2505.05470 with the settings of its SD 3.5 runs on GenEval and OCR: every step but the last, weight 0.04 of the
# divergence (0.01 on PickScore). Their code divides the latter by a variance per unit of time, so that in nats it is 0.04 times the step's
# duration, 1 / T on average. "mixgrpo" is arXiv:2507.21802: 4 of 25 steps, which move on by one after 25 rollouts; no divergence.
# In "rlr" first order takes 30 % of the steps: the low-noise end, where the likelihood ratio is noisiest (docs/estimators.md has the
# measurement). "rlr_black_box" puts the noise in the first 30 % alone: the last, low-noise steps make the likelihood ratio slow.
PRESETS: dict[str, Preset] = {
    "rlr": Preset(lambda t: {"fo_steps": _share(0.3, t), "ho_length": 1, "rest_estimator": "lr"}),
    "rlr_black_box": Preset(
        _left_out,
        sampling=lambda t: {"noise_steps": _share(0.3, t)},
        advantage="normalize",
        adv_clip_max=5.0,
    ),
    "rlr_paper": Preset(lambda t: {"fo_steps": 1, "ho_length": 2, "rest_estimator": "zo"}),
    "ddpo": Preset(lambda t: {"rest_estimator": "lr"}, advantage="normalize", adv_clip_max=5.0),
    "flow_grpo": Preset(
        _left_out,
        sampling=lambda t: {**_FLOW_SDE, "noise_steps": max(1, t - 1), "kl_coef": 0.04 / t},
        advantage="normalize",
        adv_clip_max=5.0,
    ),
    "mixgrpo": Preset(
        _left_out,
        sampling=lambda t: {**_FLOW_SDE, "noise_steps": _share(0.16, t), "noise_window": "progressive"},
        advantage="normalize",
        adv_clip_max=5.0,
    ),
    "draft": Preset(lambda t: {"fo_steps": 1}),
    "alignprop": Preset(lambda t: {"fo_steps": (1, t)}),
    "full_bp": Preset(lambda t: {"fo_steps": t}),
    "sqdf": Preset(lambda t: {"rest_estimator": "prediction"}),
    "es": Preset(lambda t: {"rest_estimator": "zo"}),
    "awm": Preset(
        lambda t: {"forward": ForwardProcess.awm(t)},
        sampling=lambda t: {"sampler": "ode", "clip_range": 1.0},
        advantage="normalize",
        adv_clip_max=5.0,
    ),
    "nft": Preset(
        lambda t: {"forward": ForwardProcess.nft(t)},
        sampling=lambda t: {"sampler": "ode", "clip_range": None},
        advantage="normalize",
        adv_clip_max=5.0,
    ),
}
