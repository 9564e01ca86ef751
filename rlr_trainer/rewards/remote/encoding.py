"""The protocol between a training run and a reward server, version 1: JSON with PNG pictures (docs/remote_rewards.md).

A request is `{"version": 1, "images": [...], "prompts": [...], "metadata": [...]}`, an answer `{"version": 1, "rewards": [...],
"metadata": ...}` or `{"version": 1, "error": "..."}`. A picture is the base64 text of a PNG file; a video is a list of them.
Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from rlr_trainer.rewards.black_box import eight_bit

PROTOCOL_VERSION = 1
SCORE_PATH, HEALTH_PATH = "/score", "/health"
TOKEN_VARIABLE = "RLR_REWARD_TOKEN"  # environment variable that holds the token, on both sides
PNG_COMPRESSION = 1  # of 9: a tenth larger than the default, several times faster
_FIRST = Field(fail_fast=True)  # a list of millions of wrong entries would otherwise give millions of errors
_Message = TypeVar("_Message")


class WireError(ValueError):
    """Something that is not, or cannot become, a message of the protocol."""


class ScoreRequest(BaseModel):
    """What a client sends: one entry of each list per picture or video."""

    model_config = ConfigDict(extra="forbid", strict=True)
    version: Literal[1]
    images: Annotated[list[str | Annotated[list[str], _FIRST]], _FIRST]
    prompts: Annotated[list[str], _FIRST]
    metadata: list[Any]


class ScoreAnswer(BaseModel):
    """What a server answers: one reward per picture or video, None where it does not apply."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    version: Literal[1]
    rewards: Annotated[list[float | None], _FIRST]
    metadata: Any = {}


def read_message(validate: Callable[[Any], _Message], message: Any) -> _Message:
    """What a pydantic model makes of a message; raises WireError, which names the fields, if it is none."""
    try:
        return validate(message)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, e['loc'])) or 'the body'}: {e['msg']}" for e in error.errors(include_input=False)[:4])
        raise WireError(f"no {error.title} of version {PROTOCOL_VERSION} of the reward protocol ({'; '.join(wrong)})") from error


def plain(value: Any) -> Any:
    """Tensors, arrays and numpy's numbers as lists and numbers: what JSON encoders call for types that they do not know."""
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return value.tolist()
    raise TypeError(f"{value!r:.80} is a {type(value).__name__}, which JSON does not have")


def check_token(token: str | None) -> None:
    """Refuses a token that cannot go into a header; the message does not show it, because it may get into logs."""
    if token is not None and not (isinstance(token, str) and token.isascii() and token.isprintable() and token.strip()):
        raise ValueError("token: must be printable ASCII text, and not empty; None for no token")


def encode_png(picture: Tensor) -> bytes:
    """PNG file of one picture, float [3, H, W] in [0, 1]: 8 bits per channel, rounded to the nearest of k / 255.

    Values outside [0, 1] are clamped first. Raises WireError for values that are not finite, and for another shape.
    """
    if picture.dim() != 3 or picture.shape[0] != 3:
        raise WireError(f"a picture has the shape {tuple(picture.shape)}: must be (3, height, width)")
    picture = picture.detach().float()
    if not torch.isfinite(picture).all():
        raise WireError("a picture holds values that are not finite (NaN or infinite), which no PNG file can hold")
    buffer = io.BytesIO()
    Image.fromarray(eight_bit(picture)).save(buffer, format="PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def encode_images(images: Tensor) -> list[Any]:
    """Base64 PNGs of [B, 3, H, W] (a string each) or [B, F, 3, H, W] (a list of strings each)."""
    if images.dim() == 5:
        return [encode_images(frames) for frames in images]
    return [base64.b64encode(encode_png(picture)).decode("ascii") for picture in images]


class Pictures:
    """The pictures or videos of a request, not yet decompressed: base64 PNGs, or equally long lists of them, all of one size.

    `size` is (width, height) of each, `pixels` the sum over all, both from the files' headers. Raises WireError for anything else.
    """

    def __init__(self, encoded: list[str | list[str]]) -> None:
        lengths = {len(entry) if isinstance(entry, list) else None for entry in encoded}
        if len(lengths) != 1 or lengths == {0}:
            raise WireError("'images' must be a list of pictures, or of videos with the same number of frames, and not empty")
        self._frames = lengths.pop()
        self._texts = [text for entry in encoded for text in (entry if isinstance(entry, list) else [entry])]
        sizes = {self._read(number).size for number in range(len(self._texts))}
        if len(sizes) > 1:
            raise WireError(f"'images' holds pictures of the sizes (width, height) {sorted(sizes)[:4]}: all must have one size")
        self.size = sizes.pop()
        self.pixels = len(self._texts) * math.prod(self.size)

    def decode(self) -> Tensor:
        """Float pictures [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]; raises WireError for a damaged file."""
        images = torch.empty(len(self._texts), 3, *reversed(self.size))
        for number in range(len(images)):
            images[number] = torch.from_numpy(np.array(self._read(number, decode=True))).permute(2, 0, 1)
        images.div_(255)
        return images if self._frames is None else images.unflatten(0, (-1, self._frames))

    def _read(self, number: int, decode: bool = False) -> Image.Image:
        try:
            data = base64.b64decode(self._texts[number], validate=True)
            picture = Image.open(io.BytesIO(data), formats=["PNG"])  # reads the header alone
            if picture.mode not in ("RGB", "L"):
                raise ValueError(f"its mode is {picture.mode!r}: must be RGB or grey (L), 8 bits per channel")
            return picture.convert("RGB") if decode else picture
        except Exception as error:  # Pillow has half a dozen types for damaged files, IndexError and SyntaxError among them
            raise WireError(f"picture {number} of 'images' cannot be read as the base64 text of a PNG file ({error})") from error
