"""Exponential moving average of the trained weights, for evaluation, pictures and the saved result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers.training_utils import EMAModel
from torch import nn
from transformers import TrainerCallback


class WeightAverage(TrainerCallback):
    """Follows the trained weights: after each update, average = decay * average + (1 - decay) * weights.

    Early decay is smaller, n / (9 + n) at update n = 2, 3, ..., and 0 at the first, so that the start is soon forgotten (diffusers'
    `EMAModel`).

    Args:
        parameters: the trained weights by name; float32.
        decay: above 0 and below 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters.values())
        self._average = EMAModel(self._parameters, decay=decay)

    @property
    def updates(self) -> int:
        """Updates followed so far."""
        return self._average.optimization_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._average.step(self._parameters)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The trained weights hold their average inside, and come back after; may be nested."""
        if self._average.temp_stored_params is not None:
            yield
            return
        self._average.store(self._parameters)
        self._average.copy_to(self._parameters)
        try:
            yield
        finally:
            self._average.restore(self._parameters)

    def take_present_weights(self, updates: int) -> None:
        """Makes the present weights the average after `updates` updates: resuming loads them there first."""
        self._average.shadow_params = [parameter.detach().clone() for parameter in self._parameters]
        self._average.optimization_step = updates

    def state_dict(self) -> dict[str, int]:
        """Of the count alone: the averaged weights are saved as weights."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.take_present_weights(state["updates"])
