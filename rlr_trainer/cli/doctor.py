"""`rlr-trainer doctor`: versions, devices, cache, access to the hub, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

LIBRARIES = ("torch", "transformers", "diffusers", "trl", "peft", "accelerate", "datasets", "huggingface_hub")
HUB_SECONDS = 3.0  # an answer that takes longer is none
# Optional parts that people look for: extra of the package -> (its modules, what it is for).
EXTRAS = {
    "tensorboard": (("tensorboard",), "report_to: tensorboard"),
    "trackers": (("wandb", "trackio", "mlflow"), "report_to: wandb, trackio, mlflow"),
    "remote": (("fastapi", "uvicorn", "httpx", "pydantic"), "rewards over HTTP"),
    "digits": (("sklearn",), "training the bundled digits model anew"),
}


def doctor(options: argparse.Namespace) -> None:
    """Prints what a report of a fault should say, and what stands in the way of a run. Needs no network, and waits seconds for it."""
    lines = [*versions(), *devices(), *storage(), hub(), *missing()]
    width = max(len(name) for name, _ in lines) + 2
    print("\n".join(f"{name:{width}}{text}" for name, text in lines))


def versions() -> Iterator[tuple[str, str]]:
    """Of Python and the libraries; those that are too old are named."""
    from rlr_trainer import __version__

    yield "rlr_trainer", f"{__version__}, in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    wanted = {one.name: one for one in _requirements() if one.marker is None}
    for name in LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "MISSING"
            continue
        needed = wanted.get(name) or wanted.get(name.replace("_", "-"))
        fits = needed is None or needed.specifier.contains(version, prereleases=True)
        yield name, version if fits else f"{version}: TOO OLD, needs {needed.specifier if needed else ''}"


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in importlib.metadata.requires("rlr-trainer") or ()]
    except importlib.metadata.PackageNotFoundError:  # run from its folder, without being installed
        return []


def devices() -> Iterator[tuple[str, str]]:
    """GPUs and CPU, with their memory."""
    import torch

    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use fp16"
        yield f"cuda:{number}", f"{card.name}, {card.total_memory / 1e9:.0f} GB, {bf16}"
    if not torch.cuda.device_count():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is built without CUDA"
        yield "cuda", f"none ({built})"
    yield "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads{_memory()}"


def _memory() -> str:
    try:
        return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"
    except (ValueError, OSError, AttributeError):
        return ""


def storage() -> Iterator[tuple[str, str]]:
    """The hub's cache, the folder that runs are written to, and what both have free."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    yield "cache", f"{cache}: {models} models, {_free(cache)}"
    here = Path.cwd()
    yield "runs", f"{here}: {_free(here)}{'' if os.access(here, os.W_OK) else ', NOT WRITABLE'}"


def _free(folder: Path) -> str:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return f"{shutil.disk_usage(there).free / 1e9:.0f} GB free"


def hub() -> tuple[str, str]:
    """Whether the hub answers, and whether there is a token."""
    from huggingface_hub import constants, get_token

    token = "a token is set" if get_token() else "no token (gated models need one: hf auth login)"
    if constants.HF_HUB_OFFLINE:
        return "hub", f"not asked, because HF_HUB_OFFLINE is set; {token}"
    started = time.perf_counter()
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS)
    except urllib.error.HTTPError as error:  # it answers
        return "hub", f"{constants.ENDPOINT} answers with {error.code}; {token}"
    except (OSError, ValueError) as error:
        return "hub", f"{constants.ENDPOINT}: NOT REACHED ({error}); models must be in the cache; {token}"
    return "hub", f"{constants.ENDPOINT} answers in {time.perf_counter() - started:.1f} s; {token}"


def missing() -> Iterator[tuple[str, str]]:
    """Optional parts that are not installed, and how they are."""
    for extra, (modules, use) in EXTRAS.items():
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        if absent:
            yield "missing", f"{', '.join(absent)}, for {use}: pip install 'rlr-trainer[{extra}]'"
