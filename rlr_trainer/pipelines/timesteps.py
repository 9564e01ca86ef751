"""What pipelines of flow-matching models give to `scheduler.set_timesteps`."""

from __future__ import annotations

from typing import Any

import torch


def flow_sigmas(num_steps: int) -> list[float]:
    """T noise levels from 1 to 1 / T, evenly spaced, before the scheduler's shift."""
    return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()


def with_flow_sigmas(scheduler: Any, num_steps: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` of `set_timesteps` and `flow_sigmas`, but for schedulers of other classes, which make their own from `use_flow_sigmas`."""
    return arguments if scheduler.config.get("use_flow_sigmas") else {"sigmas": flow_sigmas(num_steps), **arguments}


def shift_of_tokens(scheduler: Any, num_tokens: int, max_shift: float = 1.15) -> float:
    """`mu`, linear in the number of tokens of a picture, by the settings of the scheduler; ignored by those without dynamic shifting.

    `max_shift` is what the pipeline takes where the scheduler has no such setting.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # the same in all pipelines

    config = scheduler.config
    return calculate_shift(
        num_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )
