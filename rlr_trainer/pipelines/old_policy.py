"""The old policy: the one that samples, and that losses on the forward process refer to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rlr_trainer.estimators.forward_process import old_policy_decay
from rlr_trainer.pipelines.chain import PipelineChain
from rlr_trainer.pipelines.policy import Policy


class OldPolicy(TrainerCallback):
    """Follows the trained weights, once after all updates of a rollout: old = eta old + (1 - eta) weights.

    Args:
        policy: the trained policy.
        decay: (flat, rate, limit) of eta, see `old_policy_decay`; all 0 makes it the policy at the end of every rollout.
        inside: whether updates of the present rollout are still to come.
    """

    def __init__(self, policy: Policy, decay: tuple[float, float, float], inside: Callable[[], bool]) -> None:
        self.policy, self.decay, self.inside = policy, decay, inside
        self._weights: dict[str, Tensor] | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """name -> tensor; the present weights until there were updates."""
        if self._weights is None:
            self._weights = {name: p.detach().clone() for name, p in self.policy.trainable_parameters().items()}
        return self._weights

    def forget(self) -> None:
        """Begins anew, with the weights of the next rollout."""
        self._weights = None

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes a share of the trained weights, after the last update of a rollout."""
        if self.inside():
            return
        eta = old_policy_decay(state.global_step, *self.decay)
        for name, parameter in self.policy.trainable_parameters().items():
            self.weights[name].mul_(eta).add_(parameter.detach(), alpha=1 - eta)

    def output_of(self, chain: PipelineChain) -> Callable[[int, Tensor], Tensor]:
        """(step, x) -> the network's output under the old policy, on the prompts of `chain`."""
        return lambda step, x: chain.output(step, x, self.weights)

    def steps_of(self, chain: PipelineChain) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
        """(step, x) -> mean and standard deviation of the old policy's next latent."""
        return lambda step, x: chain.transition(step, x, self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": {name: tensor.cpu() for name, tensor in self.weights.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the weights of a checkpoint.

        Raises:
            ValueError: they are of another network, or of LoRA weights of other ranks or layers.
        """
        present = self.policy.trainable_parameters()
        stored = state["weights"]
        if {name: t.shape for name, t in stored.items()} != {name: p.shape for name, p in present.items()}:
            raise ValueError(
                "the checkpoint's old policy does not fit the weights that are trained: other layers, or another lora_r"
            )
        self._weights = {name: stored[name].to(p.device, p.dtype).clone() for name, p in present.items()}
