"""Ways to keep the likelihood ratio near the policy that sampled, when every rollout is used several times.

    python benchmarks/ratio_modes.py --seeds 100 101 --output runs/ratio_modes.json    # an hour on one core

All runs are the bundled digits-flow model, the digit task and the preset `flow_grpo`, with four inner epochs: one rollout of 32 pictures
feeds four updates, all but the first off-policy. The forms differ in the surrogate of a step alone. With r the ratio of per-entry mean
densities, m and m' the step's means now and when it was sampled, s its deviation, d the number of entries and D = |m - m'|^2 / (2 s^2 d):

- none: A r;
- clip: PPO's, min(A r, A clip(r, 1 - e, 1 + e)), what the library has (`clip_range`);
- kl_mask: A r, without a gradient where D > e and r has already moved in the direction of A (Flow-DPPO, arXiv:2606.11025: the exact
  divergence in place of the noisy ratio);
- guard: PPO's clipping of r exp(D), whose logarithm has mean 0 under the old policy where that of r has mean -D (the ratio normalization of
  GRPO-Guard, arXiv:2510.22319, without its weights of the steps).

Printed per form: reward, judge, Frechet distance and diversity after the last update, and reward queries to a judged 0.9.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.analysis import JUDGED, cost_to
from benchmarks.methods import Method
from benchmarks.one_run import run_ours
from benchmarks.tasks import TASKS
from rlr_trainer.estimators import sweep
from rlr_trainer.estimators.chain import gaussian_log_ratio
from rlr_trainer.estimators.half_order import clipped_surrogate

INNER_EPOCHS = 4
# form -> (name of the surrogate, e)
FORMS: dict[str, tuple[str, float | None]] = {
    "none": ("clip", None),
    "clip 1e-4": ("clip", 1e-4),
    "clip 1e-3": ("clip", 1e-3),
    "clip 1e-2": ("clip", 1e-2),
    "kl_mask 1e-5": ("kl_mask", 1e-5),
    "kl_mask 1e-4": ("kl_mask", 1e-4),
    "kl_mask 1e-3": ("kl_mask", 1e-3),
    "guard 1e-4": ("guard", 1e-4),
    "guard 1e-3": ("guard", 1e-3),
    "guard 1e-2": ("guard", 1e-2),
}


def surrogate_of(form: str, limit: float | None, advantage: Tensor, log_ratio: Tensor, divergence: Tensor) -> Tensor:
    """[N], of advantages [N], logarithms of the ratios r [N] and divergences D [N], which carry graphs."""
    if form == "clip" or limit is None:
        return clipped_surrogate(advantage, log_ratio.exp(), limit)
    if form == "guard":
        return clipped_surrogate(advantage, (log_ratio + divergence).exp(), limit)
    moved = torch.where(advantage > 0, log_ratio > 0, log_ratio < 0)
    surrogate = advantage * log_ratio.exp()
    return torch.where(moved & (divergence > limit), surrogate.detach(), surrogate)


def likelihood_ratio_with(form: str, limit: float | None) -> Any:
    """A function with the arguments of `estimators.half_order.likelihood_ratio`; it looks at its own limit instead of clip_range."""

    def likelihood_ratio(advantage, x_next, mean, std, old_mean, old_std, *, clip_range=None, mean_density=False):
        assert mean_density
        entries = mean[0].numel()
        log_ratio = gaussian_log_ratio(x_next, mean, std, old_mean, old_std) / entries
        divergence = ((mean - old_mean) / std).square().flatten(1).mean(1) / 2
        return entries * surrogate_of(form, limit, advantage, log_ratio, divergence), log_ratio.detach()

    return likelihood_ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[100, 101])
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/ratio_modes.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    method = Method({"estimator": "flow_grpo", "num_inner_epochs": INNER_EPOCHS})
    found: list[dict[str, Any]] = []
    print("| form | seed | reward | judge | Frechet | diversity | queries to judge 0.9 |\n|---|---|---|---|---|---|---|")
    for form in options.forms:
        sweep.likelihood_ratio = likelihood_ratio_with(*FORMS[form])
        for seed in options.seeds:
            curve = run_ours("digits-flow", TASKS["digit"], method, options.learning_rate, seed, options.updates).rows
            found.append({"form": form, "seed": seed, "curve": curve})
            options.output.write_text(
                json.dumps({"updates": options.updates, "rate": options.learning_rate, "runs": found}, indent=1)
            )
            last, reached = curve[-1], cost_to(curve, JUDGED, "judge", "queries")
            scores = f"{last['reward']:.2f} | {last['judge']:.2f} | {last['frechet']:.0f} | {last['diversity']:.1f}"
            print(f"| {form} | {seed} | {scores} | {'-' if reached is None else round(reached)} |", flush=True)


if __name__ == "__main__":
    main()
