"""Sana-Sprint (`SanaSprintPipeline`), a consistency model of one to four steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout
from rlr_trainer.pipelines.conditioning import Rows
from rlr_trainer.pipelines.sana import SanaAdapter


class SanaSprintAdapter(SanaAdapter):
    """Adapter of `diffusers.SanaSprintPipeline`, whose scheduler works on the circle x = cos(t) x0 + sin(t) x1 (TrigFlow).

    The network was made of one on the line x = (1 - s) x0 + s x1. Its inputs and outputs are translated, as in
    arXiv:2503.09641, with x1 of standard deviation 1; the scheduler's latents are `sigma_data` times that. Guidance is an input of the
    network, so that negative prompts have no effect.

    Raises:
        ValueError: as of `SanaAdapter`, a network that does not take the guidance scale, or another scheduler.
    """

    takes_guidance = True

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        name = type(pipeline.scheduler).__name__
        if name != "SCMScheduler":
            raise ValueError(
                f"the scheduler is a {name}, but SanaSprintPipeline translates for TrigFlow alone; give it an SCMScheduler"
            )

    @property
    def _sigma_data(self) -> float:
        return self.pipeline.scheduler.config.sigma_data

    def is_guided(self, guidance_scale: float) -> bool:
        """Never by a second branch."""
        return False

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Any]:
        """The guidance scale [1]."""
        return {"guidance": torch.tensor([guidance_scale])}

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """The velocity on the circle [N, C, h, w], at the angle `time`."""
        line = torch.sin(time) / (torch.cos(time) + torch.sin(time))  # s in [0, 1]
        length = (line**2 + (1 - line) ** 2).sqrt()
        on_line = x / self._sigma_data * length
        scale = batch["guidance"].to(x.device, rows["encoder_hidden_states"].dtype).expand(x.shape[0])
        guidance = scale * self.pipeline.transformer.config.guidance_embeds_scale
        flow = network(on_line, timestep=line.expand(x.shape[0]), guidance=guidance, **rows)
        return self._sigma_data * ((1 - 2 * line) * on_line + (1 - 2 * line + 2 * line**2) * flow) / length

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents as the decoder takes them."""
        return super().unpack(latents / self._sigma_data, layout)
