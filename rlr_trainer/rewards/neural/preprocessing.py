"""From pictures in [0, 1] to the pixels that a reward model was trained on, differentiable in the pictures.

The references work on 8-bit pictures with PIL or torchvision. PIL's bicubic (a = -1/2, with a support that grows with the reduction) is
`F.interpolate(mode="bicubic", antialias=True)`, across, then down, clipped to [0, 255] and rounded after each pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP, and OpenCLIP's default
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RANGE_TOLERANCE = 0.01  # a picture outside [0, 1] by more is in another range, not rounded
# Of PIL.Image.Resampling; the others have no differentiable counterpart in torch.
PIL_RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
# Settings of transformers' image processors -> the values that have a counterpart here; the first where there is no such setting.
OFF, ON = (None, False), (True,)
ALLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("do_pad", "crop_pct", "do_flip_channel_order", "include_top", "rescale_offset"), OFF),
    **{"do_resize": ON, "do_rescale": ON, "resample": (3, 2)},
}


class ImageRangeError(ValueError):
    """Pictures of another shape, type or range than [B, 3, H, W] float in [0, 1]."""


def check_images(name: str, images: Tensor) -> None:
    """Raises `ImageRangeError` unless the images are a float tensor [B, 3, H, W] in [0, 1]; `name` is the reward's."""
    found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
    fits = isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4 and images.shape[1] == 3 and len(images)
    if fits:
        low, high = (float(x) for x in images.detach().aminmax())
        found = f"{found} from {low:.3g} to {high:.3g}"
        fits = low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE
    if not fits:
        raise ImageRangeError(
            f"reward {name!r}: images is {found}, but must be a floating-point tensor [B, 3, H, W], of videos [B, F, 3, H, W], in [0, 1]; "
            "divide 8-bit pictures by 255, bring [-1, 1] there by (images / 2 + 0.5).clamp(0, 1)"
        )


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
    """Resize, crop or pad, normalize: [B, 3, H, W] in [0, 1] -> [B, 3, h, w], differentiable.

    Attributes:
        size: of the resized picture: a number for its shorter side, or (height, width) whatever the aspect ratio.
        pad: the number is for the longer side instead, and black is added on both sides to a square.
        crop: (height, width) cut out of the middle, or None.
        middle: the middle's first pixel when an odd number is cut: `math.floor` as transformers, `round` (half to even) as torchvision.
        resample: "bicubic" or "bilinear", both antialiased.
        mean, std: per colour, on the scale of [0, 1].
        clip: cut values outside [0, 1] that the bicubic kernel makes at edges, after each pass, as PIL does with 8-bit pictures.
        eight_bit: round to multiples of 1/255 wherever the reference does: the picture, and with `clip` each pass of the resize. The
            values are then the reference's, but for ties; the gradient is that without the rounding. For evaluation.
    """

    size: int | tuple[int, int]
    pad: bool = False
    crop: tuple[int, int] | None = None
    middle: Callable[[float], int] = math.floor
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    clip: bool = True
    eight_bit: bool = False

    @classmethod
    def torchvision_clip(cls, size: int) -> ImagePreprocessor:
        """Resize(size, bicubic), CenterCrop(size), Normalize of a PIL picture: OpenAI's CLIP package and ImageReward."""
        return cls(size=size, crop=(size, size), middle=round)

    @classmethod
    def hpsv2(cls, size: int) -> ImagePreprocessor:
        """HPSv2's inference transform: the longer side to `size`, black padding; resized as a float tensor, so nothing is clipped."""
        return cls(size=size, pad=True, clip=False)

    @classmethod
    def from_processor(cls, processor: Any, source: str) -> ImagePreprocessor:
        """The steps of a transformers image processor; ValueError, which names `source` and the setting, for one without counterpart."""
        size = _sides(processor.size)
        settings = {name: getattr(processor, name, allowed[0]) for name, allowed in ALLOWED.items()}
        wrong = {name: value for name, value in settings.items() if value not in ALLOWED[name]}
        if abs(getattr(processor, "rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
            wrong["rescale_factor"] = processor.rescale_factor
        if size is None:
            wrong["size"] = processor.size
        if wrong or size is None:
            found = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
            raise ValueError(
                f"image processor of {source!r} ({type(processor).__name__}): {found} has no differentiable counterpart here; pass "
                "preprocess=, a function from images [B, 3, H, W] in [0, 1] to the model's pixels"
            )
        crop = _sides(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
        normalized = getattr(processor, "do_normalize", True)
        return cls(
            size=size,
            crop=(crop, crop) if isinstance(crop, int) else crop,
            resample=PIL_RESAMPLE[processor.resample],
            mean=tuple(processor.image_mean) if normalized else (0.0,),
            std=tuple(processor.image_std) if normalized else (1.0,),
        )

    @classmethod
    def from_pretrained(cls, source: str) -> ImagePreprocessor:
        """The steps of the image processor in a local folder or a hub repository."""
        from transformers import AutoImageProcessor, __version__

        pil = {"backend": "pil"} if int(__version__.split(".")[0]) >= 5 else {"use_fast": False}  # torchvision is not required
        return cls.from_processor(AutoImageProcessor.from_pretrained(source, **pil), source)

    def __call__(self, images: Tensor) -> Tensor:
        """Pixels [B, 3, h, w] in the images' dtype, at least float32 (a resize in half precision loses more than an 8-bit step)."""
        pixels = images.to(torch.promote_types(images.dtype, torch.float32))
        pixels = _round_to_8_bits(pixels) if self.eight_bit else pixels
        target = self._target(*pixels.shape[-2:])
        for shape in ((pixels.shape[-2], target[1]), target):  # PIL: across first, then down
            if tuple(pixels.shape[-2:]) != shape:
                pixels = F.interpolate(pixels, size=shape, mode=self.resample, antialias=True)
                pixels = pixels.clamp(0, 1) if self.clip else pixels
                pixels = _round_to_8_bits(pixels) if self.clip and self.eight_bit else pixels
        if self.pad:
            down, across = max(target) - target[0], max(target) - target[1]
            pixels = F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))
        if self.crop is not None:
            if target[0] < self.crop[0] or target[1] < self.crop[1]:
                raise ValueError(f"crop={self.crop}: larger than the resized picture of {target} pixels; size is {self.size}")
            top, left = (self.middle((side - cut) / 2) for side, cut in zip(target, self.crop, strict=True))
            pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize."""
        if isinstance(self.size, tuple):
            return self.size
        if self.pad:
            scale = self.size / max(height, width)
            return round(height * scale), round(width * scale)
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)


def _round_to_8_bits(pixels: Tensor) -> Tensor:
    """Multiples of 1/255, halves up as PIL; the gradient is that of the identity."""
    return pixels + ((pixels.detach() * 255 + 0.5).floor() / 255 - pixels.detach())


def _sides(size: Any) -> int | tuple[int, int] | None:
    """The shorter side, or (height, width), of a processor's size; None for another kind of size."""
    sides = vars(size) if dataclasses.is_dataclass(size) else size
    given = {key: value for key, value in sides.items() if value is not None}
    if given.keys() == {"shortest_edge"}:
        return given["shortest_edge"]
    return (given["height"], given["width"]) if given.keys() == {"height", "width"} else None
