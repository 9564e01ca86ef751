"""A tiny Flux.1 Kontext of the real classes: pictures of 16 x 16 from a reference picture and a prompt."""

from __future__ import annotations

from typing import Any

from families.tiny import flux


def make_pipeline() -> Any:
    """A `FluxKontextPipeline` with the same random weights at every call."""
    return flux.make_pipeline(pipeline_class="FluxKontextPipeline")


def pictures() -> list[Any]:
    """Two reference pictures of other sizes and colours."""
    from PIL import Image

    return [Image.new("RGB", (20, 12), "black"), Image.new("RGB", (16, 16), (250, 120, 10))]


def make_sized_pipeline() -> Any:
    """The same, whose call keeps the size that it is asked for, as the adapter does; it scales sizes and references to 1 megapixel otherwise."""
    from diffusers import FluxKontextPipeline

    class Sized(FluxKontextPipeline):
        def __call__(self, *, image: Any, height: int | None = None, width: int | None = None, **arguments: Any) -> Any:
            own = self.default_sample_size * self.vae_scale_factor
            height, width = height or own, width or own
            image = [self.image_processor.resize(one, height, width) for one in image]
            size = {"height": height, "width": width, "max_area": height * width, "_auto_resize": False}
            return super().__call__(image=image, **size, **arguments)

    Sized.__name__ = "FluxKontextPipeline"  # in its folder's index
    pipeline = make_pipeline()
    pipeline.__class__ = Sized
    return pipeline
