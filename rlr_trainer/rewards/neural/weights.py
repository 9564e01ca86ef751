"""Finding and loading the weights of reward models, never unpickling code. Every failure is a `WeightsError`."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

MESSAGE_LENGTH = 1000  # of torch's list of keys that do not fit
Loaded = TypeVar("Loaded")


class WeightsError(ValueError):
    """Weights of a reward model are missing, damaged, or those of another model."""


def _load(what: str, source: str | Path, reward: str, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except Exception as error:  # the hub's, zip's, pickle's and safetensors' own types among them
        said = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise WeightsError(
            f"reward {reward!r}: cannot load {what} of {str(source)!r}: {said}. It must be an existing folder or file, or a hub id; without "
            f"a connection, download it elsewhere (`hf download {source}`) and pass the folder. If a file is damaged, download it again"
        ) from error


def find_file(source: str | Path, reward: str, *filenames: str) -> Path:
    """The weights file: `source` itself if it is a file, else the first of `filenames` in the folder or the hub repository."""
    path = Path(source).expanduser()
    found = [place for place in (path, *(path / name for name in filenames)) if place.is_file()]
    if found:
        return found[0]
    if path.is_dir():
        held = ", ".join(sorted(child.name for child in path.iterdir())[:10]) or "nothing"
        raise WeightsError(f"reward {reward!r}: folder {str(source)!r} has no {' or '.join(filenames)}; it holds {held}")
    from huggingface_hub import hf_hub_download

    return Path(_load(repr(filenames[0]), source, reward, lambda: hf_hub_download(str(source), filenames[0])))


def companion(source: str | Path, given: str | Path | None, default: str, markers: Sequence[str], subfolder: str = "") -> str:
    """Where a reward's second part (a tokenizer, a CLIP tower) is: as given; else in the subfolder or folder of the weights' source, if
    one has a file of `markers`; else the default hub id."""
    if given is not None:
        return str(given)
    path = Path(source).expanduser()
    folder = path.parent if path.is_file() else path
    found = [place for place in (folder / subfolder, folder) if any((place / name).is_file() for name in markers)]
    return str(found[0]) if found else default


def read_state_dict(path: Path, reward: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a pickled one read with `weights_only=True`; on the CPU, out of a `state_dict` entry if any."""
    # a pickled file that would run code is refused
    read = load_file if path.suffix == ".safetensors" else functools.partial(torch.load, map_location="cpu", weights_only=True)
    content = _load("weights", path, reward, lambda: read(path))
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"reward {reward!r}: {str(path)!r} holds no tensors by name, so it is not a file of weights")
    return {key.removeprefix("module."): value for key, value in content.items()}


def rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under other names: all patterns of `names` are replaced in each key, in their order. What none matches stays as it is,
    so that strict loading reports it."""
    for pattern, replacement in names.items():
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return dict(state)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: Path, reward: str, unused: str = "") -> None:
    """Loads every key of the module from the state; only keys that the pattern `unused` matches may be left over."""
    try:
        module.load_state_dict({key: value for key, value in state.items() if not re.fullmatch(unused, key)})
    except RuntimeError as error:
        problems = textwrap.shorten(str(error), MESSAGE_LENGTH)
        raise WeightsError(f"reward {reward!r}: {str(path)!r} does not fit the model: {problems}") from error


def load_pretrained(auto: Any, source: str | Path, reward: str, **options: Any) -> Any:
    """`auto.from_pretrained(source, **options)` of transformers' classes or `ImagePreprocessor`."""
    path = Path(source).expanduser()
    place = str(path if path.exists() else source)
    return _load(auto.__name__, source, reward, lambda: auto.from_pretrained(place, **options))


def load_model(auto: Any, source: str | Path, reward: str) -> Any:
    """A transformers model in float32, all of whose parts have weights."""
    model, report = load_pretrained(auto, source, reward, dtype=torch.float32, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        found = f"leave {len(missing)} parts of {type(model).__name__} without values: {', '.join(missing[:5])}"
        raise WeightsError(f"reward {reward!r}: the weights in {str(source)!r} {found}")
    return model


def load_tokenizer(auto: Any, source: str | Path, reward: str, vocabulary: int) -> Any:
    """A tokenizer that fits a model with `vocabulary` embeddings. (transformers 5 makes an empty one where the files are missing.)"""
    tokenizer = load_pretrained(auto, source, reward)
    if not vocabulary // 2 < len(tokenizer) <= vocabulary:
        raise WeightsError(
            f"reward {reward!r}: the tokenizer in {str(source)!r} knows {len(tokenizer)} tokens and the model {vocabulary}: its files are "
            "missing, or it is another model's"
        )
    return tokenizer
