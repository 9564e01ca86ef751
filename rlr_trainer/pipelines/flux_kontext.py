"""Flux.1 Kontext (`FluxKontextPipeline`): pictures conditioned on a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import without_autocast
from rlr_trainer.pipelines.adapter import Layout
from rlr_trainer.pipelines.conditioning import Rows
from rlr_trainer.pipelines.flux import FluxAdapter


class FluxKontextAdapter(FluxAdapter):
    """Adapter of `diffusers.FluxKontextPipeline`. Every sample brings a reference picture as "image" in its metadata.

    A reference is a PIL picture or a tensor [3, H, W] in [0, 1]. All are resized to the size of the run's pictures, so that a batch
    has as many tokens in each row: the pipeline's `image_processor.resize`, as its call does with `_auto_resize=False` on a picture of
    that size. Crop pictures of another aspect ratio beforehand. A size that is asked for is kept (the pipeline's call scales it to
    `max_area`).
    """

    conditions = ("image",)

    def encode_metadata(self, metadata: Sequence[Mapping[str, Any]], layout: Layout) -> dict[str, Tensor]:
        """Packed latents [N, L, 4C] of the reference pictures.

        Raises:
            TypeError, ValueError: an "image" that is no picture, or whose shape or values are others.
        """
        vae = self.decoder
        pixels = torch.cat([self._pixels(row["image"], layout) for row in metadata])
        with without_autocast(pixels.device):
            latents = self.pipeline._encode_vae_image(pixels.to(vae.device, vae.dtype), generator=None).float()
        return {"image_latents": self.pipeline._pack_latents(latents, *latents.shape)}

    def _pixels(self, image: Any, layout: Layout) -> Tensor:
        """A reference picture in the size of the run, [1, 3, H, W] in [-1, 1]."""
        from PIL.Image import Image

        if isinstance(image, Image):
            image = image.convert("RGB")
        elif not isinstance(image, Tensor) or not image.is_floating_point():
            kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(
                f"image: a reference picture is {kind}, but must be a PIL picture or a floating-point tensor [3, H, W] in [0, 1]; "
                "dataset.cast_column('image', datasets.Image()) makes pictures of files, and image / 255 such a tensor of whole numbers"
            )
        elif image.dim() != 3 or image.shape[0] != 3 or not 0 <= float(image.min()) <= float(image.max()) <= 1:
            raise ValueError(
                f"image: a reference picture has the shape {tuple(image.shape)} and values from {float(image.min()):.4g} to "
                f"{float(image.max()):.4g}, but must be [3, H, W] in [0, 1]"
            )
        else:
            image = image.detach()[None]
        processor = self.pipeline.image_processor
        return processor.preprocess(processor.resize(image, layout.height, layout.width), layout.height, layout.width)

    def _positions(self, layout: Layout) -> Tensor:
        """Positions of the picture's tokens, then the same of the reference's, told apart by their first number."""
        picture = super()._positions(layout)
        reference = picture.clone()
        reference[:, 0] = 1
        return torch.cat([picture, reference])

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer on the picture's tokens and the reference's; the output of the former, [N, L, 4C]."""
        rest = dict(rows)
        tokens = torch.cat([x, rest.pop("image_latents").to(x.dtype)], dim=1)
        return super().call(network, tokens, time, rest, batch)[:, : x.shape[1]]
