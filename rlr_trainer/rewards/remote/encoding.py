"""The protocol between a training run and a reward server, version 1: JSON with PNG pictures (docs/remote_rewards.md).

A request is `{"version": 1, "images": [...], "prompts": [...], "metadata": [...]}`, an answer `{"version": 1, "rewards": [...],
"metadata": ...}` or `{"version": 1, "error": "..."}`. A picture is the base64 text of a PNG file; a video is a list of them.
Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import io
import json
import math
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

PROTOCOL_VERSION = 1
SCORE_PATH = "/score"
HEALTH_PATH = "/health"
TOKEN_VARIABLE = "RLR_REWARD_TOKEN"  # environment variable that holds the token, on both sides

MAX_DEPTH = 64  # of nested metadata
PNG_COMPRESSION = 1  # of 9: a tenth larger than the default, several times faster


class WireError(ValueError):
    """Something that is not, or cannot become, a message of the protocol."""


_FIRST = Field(fail_fast=True)  # a list of millions of wrong entries would otherwise give millions of errors


class ScoreRequest(BaseModel):
    """What a client sends: one entry of each list per picture or video."""

    model_config = ConfigDict(extra="forbid", strict=True)
    version: Literal[1]
    images: Annotated[list[str | Annotated[list[str], _FIRST]], _FIRST]
    prompts: Annotated[list[str], _FIRST]
    metadata: list[Any]


class ScoreAnswer(BaseModel):
    """What a server answers: one reward per picture or video, None where it does not apply."""

    model_config = ConfigDict(strict=True)
    version: Literal[1]
    rewards: Annotated[list[float | None], _FIRST]
    metadata: Any = {}


_Message = TypeVar("_Message", ScoreRequest, ScoreAnswer)


def read_message(kind: type[_Message], message: Any) -> _Message:
    """The parsed JSON as a request or an answer.

    Raises:
        WireError: it is none; names the fields.
    """
    try:
        return kind.model_validate(message)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, e['loc'])) or 'the body'}: {e['msg']}" for e in error.errors()[:4])
        raise WireError(f"no {kind.__name__} of version {PROTOCOL_VERSION} of the reward protocol ({'; '.join(wrong)})") from error


def check_token(token: str | None) -> None:
    """Refuses a token that cannot go into a header.

    Raises:
        ValueError: without the token, which must not get into logs.
    """
    if token is not None and not (isinstance(token, str) and token.isascii() and token.isprintable() and token.strip()):
        raise ValueError("token: must be printable ASCII text, and not empty; None for no token")


def encode_png(picture: Tensor) -> bytes:
    """PNG file of one picture, float [3, H, W] in [0, 1]: 8 bits per channel, rounded to the nearest of k / 255.

    Values outside [0, 1] are clamped first, as every file format does.

    Raises:
        WireError: another shape, or a value that is not finite.
    """
    if picture.dim() != 3 or picture.shape[0] != 3:
        raise WireError(f"a picture has the shape {tuple(picture.shape)}: must be (3, height, width)")
    picture = picture.detach().float()
    if not torch.isfinite(picture).all():
        raise WireError("a picture holds values that are not finite (NaN or infinite), which no PNG file can hold")
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def encode_images(images: Tensor) -> list[Any]:
    """Base64 PNGs of [B, 3, H, W] (a string each) or [B, F, 3, H, W] (a list of strings each)."""
    if images.dim() not in (4, 5):
        raise WireError(f"images has the shape {tuple(images.shape)}: must be [B, 3, H, W], or [B, frames, 3, H, W] for video")
    if images.dim() == 5:
        return [encode_images(frames) for frames in images]
    return [base64.b64encode(encode_png(picture)).decode("ascii") for picture in images]


class Pictures:
    """The pictures or videos of a request, not yet decompressed.

    Args:
        encoded: base64 PNGs (8 bits, RGB or grey), or equally long lists of them; all of one size.

    Attributes:
        width, height: of each picture, from the files' headers.
        pixels: of all of them together.

    Raises:
        WireError: anything else; names the picture.
    """

    def __init__(self, encoded: list[str | list[str]]) -> None:
        lengths = {len(entry) if isinstance(entry, list) else None for entry in encoded}
        if len(lengths) != 1 or lengths == {0}:
            raise WireError("'images' must be a list of pictures, or of videos with the same number of frames, and not empty")
        self._frames = lengths.pop()
        self._texts = [text for entry in encoded for text in (entry if isinstance(entry, list) else [entry])]
        sizes = [self._read(number).size for number in range(len(self._texts))]
        self.width, self.height = sizes[0]
        self.pixels = len(sizes) * self.width * self.height
        for number, (width, height) in enumerate(sizes):
            if (width, height) != sizes[0]:
                first = f"the first picture {self.width} x {self.height}"
                raise WireError(f"{self._name(number)} is {width} x {height}, but {first}: all must have one size")

    def decode(self) -> Tensor:
        """Float pictures [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].

        Raises:
            WireError: a damaged file; names the picture.
        """
        images = torch.empty(len(self._texts), 3, self.height, self.width)
        for number in range(len(images)):
            images[number] = torch.from_numpy(np.array(self._read(number, decode=True))).permute(2, 0, 1)
        images.div_(255)
        return images if self._frames is None else images.unflatten(0, (-1, self._frames))

    def _name(self, number: int) -> str:
        return f"images[{number}]" if self._frames is None else f"images[{number // self._frames}][{number % self._frames}]"

    def _read(self, number: int, decode: bool = False) -> Image.Image:
        try:
            data = base64.b64decode(self._texts[number], validate=True)
            picture = Image.open(io.BytesIO(data), formats=["PNG"])  # reads the header alone
            if picture.mode not in ("RGB", "L"):
                raise ValueError(f"its mode is {picture.mode!r}: must be RGB or grey (L), 8 bits per channel")
            return picture.convert("RGB") if decode else picture
        except Exception as error:  # Pillow has half a dozen types for damaged files, IndexError and SyntaxError among them
            raise WireError(f"{self._name(number)} cannot be read as the base64 text of a PNG file ({error})") from error


def to_json(value: Any, name: str, *, nan_as_null: bool = False, depth: int = 0) -> Any:
    """`value` as JSON knows it: tuples, arrays and tensors become lists, numpy's numbers plain ones.

    Args:
        value: metadata of a prompt or of a reward.
        name: how messages call it.
        nan_as_null: write NaN and infinities as null in place of refusing them.

    Raises:
        WireError: something that JSON does not have; names the key.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value) and not nan_as_null:
            raise WireError(f"{name} is {value}, which JSON does not have: use None")
        return float(value) if math.isfinite(value) else None
    if depth > MAX_DEPTH:
        raise WireError(f"{name} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise WireError(f"{name} has the key {key!r} ({type(key).__name__}): JSON has only strings as keys")
        return {k: to_json(v, f"{name}[{k!r}]", nan_as_null=nan_as_null, depth=depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v, f"{name}[{i}]", nan_as_null=nan_as_null, depth=depth + 1) for i, v in enumerate(value)]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # tensors, arrays and numpy's scalars
        return to_json(value.tolist(), name, nan_as_null=nan_as_null, depth=depth + 1)
    raise WireError(
        f"{name} is a {type(value).__name__}, which JSON does not have: leave the key out, or turn it into text or numbers"
    )


def dump_json(message: Any) -> bytes:
    """The message's bytes."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")


def load_json(body: bytes) -> Any:
    """The message in a body.

    Raises:
        WireError: it is not JSON (nor are NaN and Infinity), or nested too deep.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise WireError(f"the body is not JSON ({error})") from error
