"""Gradients of all parameters as one vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MAX_ENTRIES = 2**16  # gradients with more entries are sketched to this many


class GradientReader:
    """Reads the gradients of all parameters as one vector, float32 on the CPU.

    Above `max_entries` entries it is a count sketch (Charikar, Chen, Farach-Colton 2002): entry i is added with a random sign to a random
    place, the same for all gradients. Inner products keep their expectation, squared norms are right within sqrt(2 / max_entries), 0.6 %.
    """

    def __init__(self, params: Mapping[str, Tensor], max_entries: int | None = None) -> None:
        max_entries = MAX_ENTRIES if max_entries is None else max_entries
        self.params = params
        self.num_entries = sum(p.numel() for p in params.values())
        self.sketched = self.num_entries > max_entries
        self.size = max_entries if self.sketched else self.num_entries

    def clear(self) -> None:
        """Removes the gradients."""
        for p in self.params.values():
            p.grad = None

    def read(self) -> Tensor:
        """The accumulated gradients, [size]; zeros where there are none."""
        return self.flatten({name: p.grad for name, p in self.params.items() if p.grad is not None})

    def flatten(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Tensors by parameter name as one vector, [size]; zeros for names that are missing."""
        if not self.sketched:
            parts = [gradients.get(name, torch.zeros_like(p)).detach().float().flatten() for name, p in self.params.items()]
            return torch.cat(parts).cpu()
        device = next(iter(self.params.values())).device
        sketch = torch.zeros(self.size, device=device)
        for number, (name, p) in enumerate(self.params.items()):
            if name in gradients:
                # seeded by the parameter's number: the same places and signs for every gradient
                generator = torch.Generator(device).manual_seed(number)
                drawn = torch.randint(2 * self.size, (p.numel(),), generator=generator, device=device)
                sketch.index_add_(0, drawn // 2, (1 - 2 * (drawn % 2)) * gradients[name].detach().float().flatten())
        return sketch.cpu()
