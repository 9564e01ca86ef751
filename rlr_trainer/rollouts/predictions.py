"""What the one-step prediction says of a rollout: rewards of predicted pictures, and their gradients, for the control variate."""

from __future__ import annotations

import torch
from torch import nn

from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.prediction import Predictions, prediction_critic
from rlr_trainer.rollouts.batches import SampledBatch
from rlr_trainer.rollouts.sampler import Sampler
from rlr_trainer.rollouts.scorer import Scorer


def predict(
    sampler: Sampler, scorer: Scorer, model: nn.Module, batch: SampledBatch, draw: PlanDraw, size: int, loss_scale: float = 1.0
) -> Predictions:
    """c and dc/dx at the output of every step that `draw` scores, under the present weights of `model`.

    Network, decoder and reward run with a graph on `size` samples at a time; `loss_scale` as in `reward_and_gradient`.
    """
    parts, chain, steps = [], sampler.chain(model, batch.conditioning, batch.schedule), draw.scored_steps()
    for rows in torch.arange(len(batch)).split(size):
        own = slice(int(rows[0]), int(rows[-1]) + 1)
        piece = chain if len(rows) == len(batch) else chain.select(rows)
        reward = scorer.differentiable(batch.prompts[own], batch.metadata[own])
        critic = prediction_critic(piece, piece.parameters(), reward, loss_scale)
        outputs = {step: batch.rollout.latents[step + 1][own] for step in steps}
        parts.append(Predictions.at(critic, outputs, len(rows), chain.num_steps))
    return Predictions.concatenate(parts)
