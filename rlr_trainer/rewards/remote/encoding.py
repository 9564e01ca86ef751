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
import struct
from typing import Any

import torch
from torch import Tensor

PROTOCOL_VERSION = 1
SCORE_PATH = "/score"
HEALTH_PATH = "/health"
TOKEN_VARIABLE = "RLR_REWARD_TOKEN"  # environment variable that holds the token, on both sides

MAX_DEPTH = 64  # of nested metadata
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PNG_HEADER_BYTES = 24  # up to and with the size
PNG_COMPRESSION = 1  # of 9: a tenth larger than the default, several times faster


class WireError(ValueError):
    """Something that is not, or cannot become, a message of the protocol."""


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
    from PIL import Image

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


def decode_images(encoded: Any, max_pixels: int) -> Tensor:
    """Float pictures [B, 3, H, W] or [B, F, 3, H, W] in [0, 1] of the protocol's `images`.

    Args:
        encoded: a list of base64 PNGs (8 bits, RGB or grey), or a list of equally long lists of them; all of one size.
        max_pixels: of the whole request. Sizes are read from the files' headers, before anything is decompressed.

    Raises:
        WireError: anything else; names the picture.
    """
    if not isinstance(encoded, list) or not encoded:
        raise WireError("'images' must be a list with at least one picture")
    videos = isinstance(encoded[0], list)
    rows = encoded if videos else [encoded]
    if videos and (not all(isinstance(row, list) for row in rows) or len({len(row) for row in rows}) > 1 or not rows[0]):
        raise WireError("'images' holds videos: each must be a list of the same number of frames")
    left = max_pixels
    pictures: list[Tensor] = []
    for row, frames in enumerate(rows):
        for column, text in enumerate(frames):
            place = f"images[{row}][{column}]" if videos else f"images[{column}]"
            picture, left = _decode_picture(text, place, left, max_pixels)
            if picture.shape != (pictures or [picture])[0].shape:
                raise WireError(f"{place} is {_size(picture)}, but the first picture {_size(pictures[0])}: all must have one size")
            pictures.append(picture)
    images = torch.stack(pictures).permute(0, 3, 1, 2).float().div_(255)
    return images.unflatten(0, (len(rows), -1)) if videos else images


def _size(picture: Tensor) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]}"


def _decode_picture(text: Any, place: str, left: int, max_pixels: int) -> tuple[Tensor, int]:
    """uint8 [H, W, 3], and how many pixels the request may still have."""
    import numpy as np
    from PIL import Image

    if not isinstance(text, str):
        raise WireError(f"{place} is a {_json_kind(text)}: must be the base64 text of a PNG file")
    try:
        data = base64.b64decode(text, validate=True)
        if not data.startswith(PNG_START) or len(data) < PNG_HEADER_BYTES:
            raise ValueError("it does not begin as one")
        width, height = struct.unpack(">II", data[16:PNG_HEADER_BYTES])
        left -= width * height
        if left < 0:
            raise WireError(
                f"{place} is {width} x {height}: the pictures of one request may have {max_pixels} pixels in all; send "
                "fewer per request (batch_size of the client), or raise --max_megapixels of the server"
            )
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.size != (width, height):  # a second header, which Pillow would go by
                raise ValueError("it has two headers")
            if picture.mode not in ("RGB", "L"):
                raise WireError(f"{place} is a PNG of mode {picture.mode!r}: must be RGB or grey (L), 8 bits per channel")
            pixels = np.array(picture.convert("RGB"))
    except WireError:
        raise
    except Exception as error:  # Pillow has half a dozen types for damaged files, IndexError and SyntaxError among them
        raise WireError(f"{place} is not the base64 text of a PNG file ({error})") from error
    return torch.from_numpy(pixels), left


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
        if math.isfinite(value):
            return float(value)
        if nan_as_null:
            return None
        raise WireError(f"{name} is {value}, which JSON does not have: use None")
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
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise WireError(f"the body is not JSON ({error})") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_request(body: bytes, max_pixels: int) -> tuple[Tensor, tuple[str, ...], tuple[Any, ...]]:
    """(images, prompts, metadata) of a request's body.

    Raises:
        WireError: the message says what is wrong.
    """
    message = load_json(body)
    if not isinstance(message, dict):
        raise WireError(f"the body is a {_json_kind(message)}: must be an object")
    if message.get("version") != PROTOCOL_VERSION:
        raise WireError(f"'version' is {message.get('version')!r:.80}: this server speaks version {PROTOCOL_VERSION}")
    keys = {"version", "images", "prompts", "metadata"}
    if message.keys() != keys:
        missing, unknown = sorted(keys - message.keys()), sorted(map(repr, message.keys() - keys))
        raise WireError(
            f"the request lacks {', '.join(missing) or 'nothing'} and has the unknown keys {', '.join(unknown)[:200] or '(none)'}"
        )
    prompts, metadata = message["prompts"], message["metadata"]
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise WireError("'prompts' must be a list of strings")
    if not isinstance(metadata, list):
        raise WireError("'metadata' must be a list with one entry per picture")
    images = decode_images(message["images"], max_pixels)
    if not len(images) == len(prompts) == len(metadata):
        raise WireError(f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata: must be as many of each")
    return images, tuple(prompts), tuple(metadata)


def read_answer(message: Any, count: int) -> tuple[list[float | None], Any]:
    """(rewards, reward metadata) of a parsed answer for `count` pictures.

    Raises:
        WireError: it is not an answer of the protocol.
    """
    if not isinstance(message, dict) or message.get("version") != PROTOCOL_VERSION:
        raise WireError(f"is not an answer of version {PROTOCOL_VERSION} of the reward protocol: {json.dumps(message)[:120]}")
    rewards = message.get("rewards")
    if not isinstance(rewards, list) or len(rewards) != count:
        raise WireError(f"answered with rewards {json.dumps(rewards)[:120]}: must be a list of {count}, one per picture")
    for reward in rewards:
        if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float)):
            raise WireError(f"answered with the reward {json.dumps(reward)[:80]}: must be a number or null")
    return rewards, message.get("metadata", {})


def _json_kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")
