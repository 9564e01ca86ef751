"""Two networks that share the steps of one chain, as one module: Wan 2.2's for the noisy steps and for the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DenoiserPair(nn.Module):
    """The network of the noisy steps and the one of the later steps, of which each call uses one.

    Args:
        networks: name -> network, the one of the noisy steps first.
        trained: names of those that are trained.
    """

    _supports_gradient_checkpointing = True

    def __init__(self, networks: dict[str, Any], trained: tuple[str, ...]) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.names, self.trained = tuple(networks), trained
        self._keep_in_fp32_modules = [part for network in networks.values() for part in network._keep_in_fp32_modules or []]

    @property
    def trained_networks(self) -> dict[str, Any]:
        """Those that are trained, by name."""
        return {name: getattr(self, name) for name in self.trained}

    @property
    def config(self) -> Any:
        """Of the first network; the second's is the same."""
        return getattr(self, self.names[0]).config

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(self, name).is_gradient_checkpointing for name in self.names)

    def enable_gradient_checkpointing(self) -> None:
        for name in self.names:
            getattr(self, name).enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        for name in self.names:
            getattr(self, name).disable_gradient_checkpointing()

    def forward(self, *args: Any, late: bool, **kwargs: Any) -> tuple[Tensor]:
        """The output of the network for the later steps, if `late`, or of the one for the noisy steps."""
        output = getattr(self, self.names[int(late)])(*args, **kwargs)[0]
        idle = [p for p in getattr(self, self.names[1 - int(late)]).parameters() if p.requires_grad]
        if idle and torch.is_grad_enabled():
            # The idle network takes part with weight 0: a step of a frozen network alone has a graph, and processes that average gradients
            # find one of every parameter.
            output = output + 0.0 * sum(p.flatten()[:1].sum() for p in idle)
        return (output,)
