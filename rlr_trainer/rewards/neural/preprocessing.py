"""From pictures in [0, 1] to the pixels that a reward model was trained on, differentiable in the pictures.

The reference pipelines of the reward models work on 8-bit pictures with PIL or torchvision. The same steps on float tensors:

| step of the reference                          | here                                                                      |
|------------------------------------------------|---------------------------------------------------------------------------|
| PIL bicubic (a = -1/2, support grows with 1/s) | `F.interpolate(mode="bicubic", antialias=True)`, across, then down, as PIL |
| PIL clips to [0, 255] after each pass          | `clip=True`                                                               |
| PIL rounds to 8 bits after each pass           | `eight_bit=True`: the same values, gradient of the unrounded resize       |

Shape suffixes: B pictures, C = 3 colours, H x W pixels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP, and OpenCLIP's default
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RANGE_TOLERANCE = 0.01  # a picture outside [0, 1] by more is in another range, not rounded
FOREIGN_STEPS = ("do_pad", "crop_pct", "do_flip_channel_order", "include_top", "rescale_offset")
# Of PIL.Image.Resampling; the others have no differentiable counterpart in torch.
PIL_RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}


class ImageRangeError(ValueError):
    """Pictures of another shape, type or range than [B, 3, H, W] float in [0, 1]."""


def check_images(name: str, images: Tensor) -> None:
    """Raises `ImageRangeError` unless the images are a float tensor [B, 3, H, W] in [0, 1]; `name` is the reward's."""
    if (
        not isinstance(images, Tensor)
        or not images.is_floating_point()
        or images.ndim != 4
        or images.shape[1] != 3
        or not len(images)
    ):
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ImageRangeError(
            f"reward {name!r}: images is {found}, but must be a floating-point tensor [B, 3, H, W] in [0, 1]; divide 8-bit pictures "
            "by 255, and score a video frame by frame (images.flatten(0, 1), each prompt repeated)"
        )
    low, high = (float(x) for x in images.detach().aminmax())
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ImageRangeError(
            f"reward {name!r}: images has values from {low:.3g} to {high:.3g}, but must be in [0, 1]; pictures in [-1, 1] are brought "
            "there by (images / 2 + 0.5).clamp(0, 1)"
        )


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
    """Resize, crop or pad, normalise: [B, 3, H, W] in [0, 1] -> [B, 3, h, w], differentiable.

    Attributes:
        size: pixels of the resized picture, or (height, width) for `fit="exact"`.
        fit: "shortest": the shorter side becomes `size`; "longest": the longer one, and black is added on both sides to a square;
            "exact": both sides as given, whatever the aspect ratio.
        crop: (height, width) cut out of the middle, or None.
        crop_offset: where the middle is when an odd number of pixels is cut: "floor" as transformers does, "round" (half to even)
            as torchvision does. They differ by one pixel.
        resample: "bicubic" or "bilinear", both antialiased.
        mean, std: per colour, on the scale of [0, 1]; None for none.
        clip: cut values outside [0, 1] that the bicubic kernel makes at edges, after each pass, as PIL does with 8-bit pictures.
        eight_bit: round to multiples of 1/255 wherever the reference does (the picture itself; with `clip` also after each pass of
            the resize). The values are then the reference's, but for ties (Pillow 13 also rounds elsewhere where it squeezes a
            picture more down than across); the gradient is that without the rounding. For evaluation: training needs none.
    """

    size: int | tuple[int, int]
    fit: Literal["shortest", "longest", "exact"] = "shortest"
    crop: tuple[int, int] | None = None
    crop_offset: Literal["floor", "round"] = "floor"
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] | None = CLIP_MEAN
    std: tuple[float, ...] | None = CLIP_STD
    clip: bool = True
    eight_bit: bool = False

    @classmethod
    def torchvision_clip(cls, size: int, *, eight_bit: bool = False) -> ImagePreprocessor:
        """Resize(size, bicubic), CenterCrop(size), Normalize of a PIL picture: OpenAI's CLIP package and ImageReward."""
        return cls(size=size, crop=(size, size), crop_offset="round", eight_bit=eight_bit)

    @classmethod
    def hpsv2(cls, size: int, *, eight_bit: bool = False) -> ImagePreprocessor:
        """HPSv2's inference transform: the longer side to `size`, black padding; resized as a float tensor, so nothing is clipped."""
        return cls(size=size, fit="longest", clip=False, eight_bit=eight_bit)

    @classmethod
    def from_processor(cls, processor: Any, source: str, *, eight_bit: bool = False) -> ImagePreprocessor:
        """The steps of a transformers image processor.

        Raises:
            ValueError: a step that has no counterpart here; names `source` and the setting.
        """
        wrong = [name for name in FOREIGN_STEPS if getattr(processor, name, None)]
        wrong += [name for name in ("do_resize", "do_rescale") if not getattr(processor, name, True)]
        if abs(getattr(processor, "rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
            wrong.append("rescale_factor")
        if getattr(processor, "resample", 3) not in PIL_RESAMPLE:
            wrong.append("resample")
        if wrong:
            settings = ", ".join(f"{name}={getattr(processor, name)!r}" for name in wrong)
            raise ValueError(
                f"image processor of {source!r} ({type(processor).__name__}): {settings} has no differentiable counterpart here; pass "
                "preprocess=, a function from images [B, 3, H, W] in [0, 1] to the model's pixels"
            )
        size = _sides(processor.size, source)
        crop = _sides(processor.crop_size, source) if getattr(processor, "do_center_crop", False) else None
        if isinstance(crop, int):
            crop = (crop, crop)
        normalize = getattr(processor, "do_normalize", True)
        return cls(
            size=size,
            fit="shortest" if isinstance(size, int) else "exact",
            crop=crop,
            resample=PIL_RESAMPLE[processor.resample],
            mean=tuple(processor.image_mean) if normalize else None,
            std=tuple(processor.image_std) if normalize else None,
            eight_bit=eight_bit,
        )

    @classmethod
    def from_pretrained(cls, source: str, *, eight_bit: bool = False) -> ImagePreprocessor:
        """The steps of the image processor in a local folder or a hub repository.

        Raises:
            OSError: it is not there. ValueError: as `from_processor`.
        """
        from transformers import AutoImageProcessor, __version__

        pil = {"backend": "pil"} if int(__version__.split(".")[0]) >= 5 else {"use_fast": False}  # torchvision is not required
        return cls.from_processor(AutoImageProcessor.from_pretrained(source, **pil), source, eight_bit=eight_bit)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Pixels [B, 3, h, w] in the images' dtype, at least float32 (a resize in half precision loses more than an 8-bit step)."""
        pixels = images_BCHW.to(torch.promote_types(images_BCHW.dtype, torch.float32))
        pixels = _round_to_8_bits(pixels) if self.eight_bit else pixels
        pixels = self._resize(pixels, self._target(pixels.shape[-2:]))
        if self.fit == "longest":
            pixels = _pad_to_square(pixels, self._one_size())
        if self.crop is not None:
            pixels = self._center_crop(pixels, self.crop)
        if self.mean is not None and self.std is not None:
            mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
            pixels = (pixels - mean) / std
        return pixels

    def _one_size(self) -> int:
        if isinstance(self.size, int):
            return self.size
        raise ValueError(f"size={self.size!r}: fit={self.fit!r} takes one number")

    def _target(self, shape: torch.Size) -> tuple[int, int]:
        height, width = shape
        if self.fit == "exact":
            return (self.size, self.size) if isinstance(self.size, int) else self.size
        size = self._one_size()
        if self.fit == "longest":
            scale = size / max(height, width)
            return round(height * scale), round(width * scale)
        if height <= width:
            return size, int(size * width / height)
        return int(size * height / width), size

    def _resize(self, pixels: Tensor, target: tuple[int, int]) -> Tensor:
        for shape in ((pixels.shape[-2], target[1]), target):  # PIL: across first, then down
            if tuple(pixels.shape[-2:]) != shape:
                pixels = F.interpolate(pixels, size=shape, mode=self.resample, antialias=True)
                pixels = pixels.clamp(0, 1) if self.clip else pixels
                pixels = _round_to_8_bits(pixels) if self.clip and self.eight_bit else pixels
        return pixels

    def _center_crop(self, pixels: Tensor, crop: tuple[int, int]) -> Tensor:
        surplus = [pixels.shape[-2] - crop[0], pixels.shape[-1] - crop[1]]
        if min(surplus) < 0:
            raise ValueError(
                f"crop={crop}: larger than the resized picture of {tuple(pixels.shape[-2:])} pixels; size is {self.size}"
            )
        top, left = (round(s / 2) if self.crop_offset == "round" else s // 2 for s in surplus)
        return pixels[..., top : top + crop[0], left : left + crop[1]]


def _round_to_8_bits(pixels: Tensor) -> Tensor:
    """Multiples of 1/255, halves up as PIL; the gradient is that of the identity."""
    return pixels + ((pixels.detach() * 255 + 0.5).floor() / 255 - pixels.detach())


def _pad_to_square(pixels: Tensor, size: int) -> Tensor:
    height, width = size - pixels.shape[-2], size - pixels.shape[-1]
    return F.pad(pixels, (width // 2, width - width // 2, height // 2, height - height // 2))


def _sides(size: Any, source: str) -> int | tuple[int, int]:
    """The shorter side, or (height, width), of a processor's size."""
    sides = dataclasses.asdict(size) if dataclasses.is_dataclass(size) and not isinstance(size, type) else dict(size)
    given = {key: value for key, value in sides.items() if value is not None}
    if given.keys() == {"shortest_edge"}:
        return given["shortest_edge"]
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    raise ValueError(f"image processor of {source!r}: size={given!r} must be a shortest_edge, or a height and a width")
