"""What pipelines of videos share: sizes with a number of frames, and pictures in the order in which rewards see them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter, check_sides


class VideoAdapter(PipelineAdapter):
    """An adapter whose decoder makes videos [N, 3, F, H, W], which rewards see as [N, F, 3, H, W]."""

    @property
    def undivided(self) -> str | None:
        """See `PipelineAdapter`; decoders that can decode tiles of frames have a switch for it."""
        if getattr(self.decoder, "use_framewise_decoding", True):
            return None
        return (
            "its decoder takes all frames at once; call pipe.vae.enable_gradient_checkpointing(), which keeps the decoder's graph block by "
            "block, or set pipe.vae.use_framewise_decoding=True, which decodes overlapping tiles of frames and blends them (other pictures)"
        )

    def video_size(
        self,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        *,
        multiple: int,
        rule: str,
        period: int,
    ) -> tuple[int, int, int]:
        """Height and width in pixels and number of frames, checked.

        Args:
            height, width, num_frames: as asked for; None is the default of the pipeline's call.
            multiple: height and width must be multiples of it.
            rule: what `multiple` is, in words, for the message.
            period: frames that the VAE makes of one latent frame, after the first.

        Raises:
            ValueError: a size or a number of frames that does not fit; names the rule and the nearest that does.
        """
        check_sides(height, width, multiple, rule)
        check_frames(num_frames, period)
        asked = {"height": height, "width": width, "num_frames": num_frames}
        height, width, num_frames = (call_default(self.pipeline, name) if size is None else size for name, size in asked.items())
        return height, width, num_frames

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, ...] to videos [N, F, 3, H, W]; see `PipelineAdapter.decode`."""
        return super().decode(latents, layout).transpose(1, 2)


def call_default(pipeline: Any, name: str) -> Any:
    """Default of an argument of the pipeline's call."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def check_frames(num_frames: int | None, period: int) -> None:
    """Refuses a number of frames that a causal VAE does not make: 1 + k `period` frames of 1 + k latent frames; ValueError names the nearest."""
    if num_frames is None or (num_frames > 0 and (num_frames - 1) % period == 0):
        return
    below = max(num_frames - 1, 0) // period * period + 1
    nearest = "the nearest is 1" if num_frames < 1 else f"the nearest are {below} and {below + period}"
    raise ValueError(
        f"num_frames={num_frames}: must be 1 plus a multiple of {period}, because the VAE makes one frame of the first latent frame and "
        f"{period} of every other; {nearest}"
    )
