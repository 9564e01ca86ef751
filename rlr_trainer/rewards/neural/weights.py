"""Finding and loading the weights of reward models: local folders, files and hub repositories; never unpickling code.

Every failure is a `WeightsError` that names the file, what is wrong with it and where it comes from.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
MESSAGE_LENGTH = 1000  # of torch's list of keys that do not fit


class WeightsError(ValueError):
    """Weights of a reward model are missing, damaged, or those of another model."""


def is_local(source: str | Path) -> bool:
    """Whether the source is a folder or a file of this machine (or looks like the path of one) rather than a hub id."""
    return Path(source).expanduser().exists() or not HUB_ID.fullmatch(str(source)) or str(source).startswith(".")


def find_file(source: str | Path, reward: str, *filenames: str) -> Path:
    """The weights file: `source` itself if it is a file, else the first of `filenames` in the folder or the hub repository.

    Raises:
        WeightsError: there is none; says where it was looked for and where it can be had.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        found = [path / name for name in filenames if (path / name).is_file()]
        if not found:
            held = ", ".join(sorted(child.name for child in path.iterdir())[:10]) or "nothing"
            raise WeightsError(f"reward {reward!r}: folder {str(source)!r} has no {' or '.join(filenames)}; it holds {held}")
        return found[0]
    if is_local(source):
        raise WeightsError(f"reward {reward!r}: no folder or file {str(source)!r} (and it is no hub id)")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), filenames[0]))
    except (OSError, ValueError) as error:  # all of the hub's errors are one of them
        raise WeightsError(
            f"reward {reward!r}: cannot get {filenames[0]!r} of the hub repository {str(source)!r}: {_first_line(error)}"
            f"{_way_out(source)}"
        ) from error


def companion(source: str | Path, given: str | Path | None, default: str, markers: Sequence[str], subfolder: str = "") -> str:
    """Where a reward's second part (a tokenizer, a CLIP tower) is: as given; else in the weights' own folder; else the default hub id.

    Args:
        source: folder, file or hub id of the weights.
        given: what the caller asked for, or None.
        default: hub id of the published part.
        markers: files that show that a folder has the part.
        subfolder: folder inside the weights' folder that is looked at first.
    """
    if given is not None:
        return str(given)
    path = Path(source).expanduser()
    folder = path.parent if path.is_file() else path
    found = [place for place in (folder / subfolder, folder) if any((place / name).is_file() for name in markers)]
    return str(found[0]) if found else default


def read_state_dict(path: Path, reward: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a pickled one read with `weights_only=True`; on the CPU, out of a `state_dict` entry if any.

    Raises:
        WeightsError: the file is damaged, holds something else than tensors, or would run code.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors raise half a dozen types of their own
        raise WeightsError(
            f"reward {reward!r}: {str(path)!r} ({path.stat().st_size / 1e6:.1f} MB) cannot be read as weights: {_first_line(error)}. If "
            "it is damaged, download it again; files that hold more than tensors are never loaded"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"reward {reward!r}: {str(path)!r} holds no tensors by name, so it is not a file of weights")
    return {key.removeprefix("module."): value for key, value in content.items()}


def rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under other names. A key that no pattern matches keeps its name, so that strict loading reports it.

    Args:
        names: patterns of `re` and their replacements; all are applied to each key, in their order.
    """
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in names.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: Path, reward: str, unused: str = "") -> None:
    """Loads every key of the module from the state; keys that the pattern `unused` matches may be left over.

    Raises:
        WeightsError: keys missing, left over, or of another shape.
    """
    try:
        module.load_state_dict({key: value for key, value in state.items() if not re.fullmatch(unused, key)})
    except RuntimeError as error:
        problems = textwrap.shorten(str(error), MESSAGE_LENGTH)
        raise WeightsError(f"reward {reward!r}: {str(path)!r} does not fit the model: {problems}") from error


def load_pretrained(auto: Any, source: str | Path, reward: str, **options: Any) -> Any:
    """`auto.from_pretrained(source, **options)`, with its failures as `WeightsError`.

    Args:
        auto: a tokenizer or model class of transformers, or `ImagePreprocessor`.
        source: local folder or hub id.
        reward: its name, for messages.

    Raises:
        WeightsError: no such folder or repository, or damaged files.
    """
    local = is_local(source)
    place = str(Path(source).expanduser() if local else source)
    if local and not Path(place).is_dir():
        raise WeightsError(f"reward {reward!r}: no folder {str(source)!r} (and it is no hub id)")
    try:
        return auto.from_pretrained(place, **options)
    except Exception as error:  # OSError, ValueError, RuntimeError, those of safetensors and pickle
        raise WeightsError(
            f"reward {reward!r}: cannot load {auto.__name__} from {place!r}: {_first_line(error)}{'' if local else _way_out(source)}"
        ) from error


def load_model(auto: Any, source: str | Path, reward: str) -> Any:
    """A transformers model in float32.

    Raises:
        WeightsError: as `load_pretrained`; or weights that leave a part of the model without values.
    """
    model, report = load_pretrained(auto, source, reward, dtype=torch.float32, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise WeightsError(
            f"reward {reward!r}: the weights in {str(source)!r} leave {len(missing)} parts of {type(model).__name__} without values: "
            f"{', '.join(missing[:5])}"
        )
    return model


def load_tokenizer(auto: Any, source: str | Path, reward: str, vocabulary: int) -> Any:
    """A tokenizer that fits a model with `vocabulary` embeddings.

    Raises:
        WeightsError: as `load_pretrained`; or a tokenizer of another size. (transformers 5 makes an empty one where the files are missing.)
    """
    tokenizer = load_pretrained(auto, source, reward)
    if not vocabulary // 2 < len(tokenizer) <= vocabulary:
        raise WeightsError(
            f"reward {reward!r}: the tokenizer in {str(source)!r} knows {len(tokenizer)} tokens and the model {vocabulary}: its files are "
            "missing, or it is another model's"
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _way_out(source: str | Path) -> str:
    return f". Without a connection, download the repository elsewhere (`hf download {source}`) and pass the folder"
