"""The bundled model: a small Stable Diffusion pipeline that writes digits, and two classifiers that read them.

Everything here was trained from nothing by `examples/digits/pretrain.py` on the 1,797 digit pictures that scikit-learn
ships; `weights/README.md` is the model card with the measured quality. Nothing is downloaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlr_trainer.digits.classifiers import CLASSIFIERS, DigitClassifier
from rlr_trainer.digits.metrics import MIN_IMAGES, features_frechet_distance

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = [
    "DIGIT_NAMES",
    "PROMPT",
    "WEIGHTS",
    "class_prompt",
    "frechet_distance",
    "load_classifier",
    "load_pipeline",
]

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT = "a handwritten digit"
WEIGHTS = Path(__file__).parent / "weights"

_WAY_OUT = "reinstall rlr_trainer, or make it anew: `python examples/digits/pretrain.py --output_dir {directory}`."


def class_prompt(digit: int) -> str:
    """The prompt that asks for one digit: `class_prompt(7)` is "a handwritten digit seven"."""
    return f"{PROMPT} {DIGIT_NAMES[_checked_digit(digit)]}"


def load_pipeline(directory: str | Path | None = None, **components: Any) -> "StableDiffusionPipeline":
    """The bundled text-to-image pipeline: 32 x 32 pixels, float32, on the CPU, progress bar off, no safety checker.

    Args:
        directory: Folder of weights as `pretrain.py` writes it; the bundled one by default.
        components: Parts that replace the bundled ones, such as `scheduler=` or `unet=`.

    Raises:
        TypeError: A name in `components` is no part of the pipeline.
        FileNotFoundError, RuntimeError: The weights are missing or damaged.
    """
    directory = _checked_directory(directory) / "pipeline"
    known = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    for name in components:
        if name not in known:
            raise TypeError(
                f"load_pipeline got {name!r}, but the digits pipeline has only the parts {', '.join(known)}; "
                "leave it out, or set it on the pipeline that load_pipeline returns."
            )
    missing = [name for name in ("model_index.json", *known) if not (directory / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"The digits pipeline in {directory} lacks {', '.join(missing)}, but every part must be there; "
            + _WAY_OUT.format(directory=directory.parent)
        )
    pipeline_class = _import_pipeline_class()
    try:
        with _no_loading_bars():
            # low_cpu_mem_usage=False fills float32 modules, whatever the precision of the files; the argument for the
            # precision is called torch_dtype in older versions and dtype in newer ones
            pipeline = pipeline_class.from_pretrained(directory, local_files_only=True, low_cpu_mem_usage=False, **components)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RuntimeError(
            f"The digits pipeline in {directory} cannot be read ({error}), so its files are damaged; "
            + _WAY_OUT.format(directory=directory.parent)
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_classifier(name: str, directory: str | Path | None = None) -> DigitClassifier:
    """One of the two digit classifiers, in eval mode and frozen, differentiable in the images.

    Args:
        name: "reward" (to train with) or "judge" (another architecture, for judging what the training has made).
        directory: Folder of weights as `pretrain.py` writes it; the bundled one by default.

    Returns:
        A module: images [B, 3, H, W] float in [0, 1], any H and W -> logits [B, 10]. Its method `features(images)`
        gives the penultimate features [B, F].

    Raises:
        ValueError: There is no classifier of this name.
        FileNotFoundError, RuntimeError: The weights are missing or damaged.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"name is {name!r}, but a digit classifier is one of {', '.join(CLASSIFIERS)}; choose one.")
    classifier = CLASSIFIERS[name]()
    path = _checked_directory(directory) / f"{name}.safetensors"
    try:
        classifier.load_state_dict(_read_tensors(path))
    except RuntimeError as error:
        raise RuntimeError(
            f"{path} does not hold the weights of the {name!r} classifier ({error}); " + _WAY_OUT.format(directory=path.parent)
        ) from error
    return classifier.eval().requires_grad_(False)


def frechet_distance(images: Tensor, digit: int, directory: str | Path | None = None) -> float:
    """Frechet distance between pictures and the real digits of one class; lower is closer to the data.

    It is taken in the judge's features, projected to the first 16 principal components of the real digits of all
    classes. It grows as the number of pictures falls: compare only distances over equally many pictures.

    Args:
        images: [N, 3, H, W] float in [0, 1], at least 17 of them.
        digit: Class 0..9.
        directory: Folder of weights as `pretrain.py` writes it; the bundled one by default.

    Raises:
        ValueError: `digit` is no class, or there are too few images.
        FileNotFoundError, RuntimeError: The weights are missing or damaged.
    """
    _checked_digit(digit)
    if len(images) < MIN_IMAGES:
        raise ValueError(
            f"images holds {len(images)} pictures, but a covariance in {MIN_IMAGES - 1} components needs at least "
            f"{MIN_IMAGES}; pass more pictures (hundreds give a steady distance)."
        )
    judge, statistics = _judge_and_statistics(_checked_directory(directory))
    with torch.no_grad():
        features_NF = judge.features(images.detach().float().cpu())
    return features_frechet_distance(features_NF, digit, statistics)


def _import_pipeline_class() -> "type[StableDiffusionPipeline]":
    """Import diffusers' pipeline without transformers' notes on image processors, of which this pipeline has none."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        from diffusers import StableDiffusionPipeline
    finally:
        logging.set_verbosity(verbosity)
    return StableDiffusionPipeline


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """No progress bars of diffusers and transformers for a while: loading takes a tenth of a second."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    enabled = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in enabled:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in enabled:
            library.enable_progress_bar()


@lru_cache(maxsize=2)
def _judge_and_statistics(directory: Path) -> tuple[DigitClassifier, dict[str, Tensor]]:
    """The judge and the statistics of the real digits in its features, read once: the distance is taken often."""
    return load_classifier("judge", directory), _read_tensors(directory / "statistics.safetensors")


def _checked_directory(directory: str | Path | None) -> Path:
    directory = WEIGHTS if directory is None else Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"directory is {str(directory)!r}, but the digits weights must be in an existing folder; "
            + _WAY_OUT.format(directory=directory)
        )
    return directory


def _checked_digit(digit: int) -> int:
    if isinstance(digit, bool) or not isinstance(digit, int) or not 0 <= digit <= 9:
        raise ValueError(f"digit is {digit!r}, but it must be an integer from 0 to 9; pass for example digit=7.")
    return digit


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but the digits need it; " + _WAY_OUT.format(directory=path.parent))
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RuntimeError(
            f"{path} cannot be read ({error}), so it is damaged; " + _WAY_OUT.format(directory=path.parent)
        ) from error
