"""The bundled models: small pipelines that write digits, and classifiers that read them.

"digits" is a Stable Diffusion 1 pipeline, "digits-flow" its flow-matching twin, a Stable Diffusion 3 pipeline, and "moving-digits" a
text-to-video pipeline, a Wan, of which `rlr_trainer.digits.moving` has the rest.
Everything here was trained from nothing by the programs in `examples/digits` on the 1,797 digit pictures that
scikit-learn ships; each folder of weights has a model card `README.md` with the measured quality. Nothing is downloaded.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlr_trainer.digits.classifiers import CLASSIFIERS, DigitClassifier

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Module = TypeVar("Module", bound=torch.nn.Module)

__all__ = [
    "DIGIT_NAMES",
    "MODELS",
    "OPTIONS",
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
MODELS = {
    "digits": WEIGHTS,
    "digits-flow": WEIGHTS.with_name("weights_flow"),
    "moving-digits": WEIGHTS.with_name("weights_moving"),
}

# Options of `RLRConfig` with which these models learn within minutes; RLRConfig's own defaults are for large models. The command line takes
# them where a run gives no others. docs/benchmarks.md has what was tried: at 1e-2 single runs lose what they learned.
OPTIONS: dict[str, float] = {
    "sample_num_steps": 10,
    "sample_guidance_scale": 1.0,
    "per_device_train_batch_size": 16,
    "learning_rate": 5e-3,
    "lora_r": 4,
}


def class_prompt(digit: int) -> str:
    """The prompt that asks for one digit: `class_prompt(7)` is "a handwritten digit seven"."""
    _check_digit(digit)
    return f"{PROMPT} {DIGIT_NAMES[digit]}"


def load_pipeline(model: str | Path = "digits") -> "DiffusionPipeline":
    """A bundled pipeline: 32 x 32 pixels, float32, on the CPU, progress bar off, no safety checker.

    Args:
        model: A name of `MODELS`: "digits" is a `StableDiffusionPipeline`, "digits-flow" a `StableDiffusion3Pipeline`
            without T5, "moving-digits" a `WanPipeline`. Or a folder of weights as the programs in `examples/digits` write it.

    Raises:
        ValueError: There is no such model and no such folder.
        RuntimeError: The weights are missing or damaged, or "moving-digits" lacks the package ftfy, which diffusers 0.35 needs for it.
    """
    directory = MODELS.get(str(model), Path(model))
    if isinstance(model, str) and not directory.is_dir():
        raise ValueError(f"model={model!r}: must be one of {', '.join(MODELS)}, or a folder of weights")
    with _weights_of(directory, "pipeline") as folder, _quiet():
        from diffusers import DiffusionPipeline

        # parts that the pipeline was saved without, such as a T5, are found only if they are named
        absent = {name: None for name, part in DiffusionPipeline.load_config(folder).items() if part == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.float()  # the files hold half precision
    if str(model) in MODELS:
        pipeline.register_to_config(
            _name_or_path=str(model)
        )  # what records and model cards call it, in place of this machine's path
    pipeline.set_progress_bar_config(disable=True)
    if absent.keys() >= {"text_encoder_3", "tokenizer_3"}:
        # training and sampling encode prompts by this method; the 256 zero rows that stand for T5 would be 8 of 9 of the tokens
        # (diffusers 0.35 adds as many as the tokenizer's length instead)
        pipeline.encode_prompt = partial(pipeline.encode_prompt, max_sequence_length=0)
    if type(pipeline).__name__ == "WanPipeline":
        _check_cleaning()
        pipeline.encode_prompt = _with_rows_at_most(pipeline.tokenizer.model_max_length, pipeline.encode_prompt)
    return pipeline


def _check_cleaning() -> None:
    """RuntimeError where this diffusers' `WanPipeline` cannot clean prompts: that of 0.35 calls ftfy, whether it is there or not."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    try:
        prompt_clean(PROMPT)
    except NameError as error:
        raise RuntimeError(
            f"moving-digits: the WanPipeline of this diffusers needs a package that is missing ({error}); pip install ftfy"
        ) from error


def _with_rows_at_most(rows: int, encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """`WanPipeline.encode_prompt` with no more zero rows than the tokenizer's length; all else of the 512 would be zeros."""

    @wraps(encode_prompt)
    def encode(*args: Any, max_sequence_length: int = rows, **options: Any) -> Any:
        return encode_prompt(*args, max_sequence_length=min(max_sequence_length, rows), **options)

    return encode


def load_classifier(name: str, directory: str | Path = WEIGHTS) -> DigitClassifier:
    """One of the two digit classifiers, in eval mode and frozen, differentiable in the images.

    Args:
        name: "reward" (to train with) or "judge" (another architecture, for judging what the training has made).
        directory: Folder of weights as `pretrain.py` writes it.

    Returns:
        A module: images [B, 3, H, W] float in [0, 1], any H and W -> logits [B, 10]. Its method `features(images)`
        gives the penultimate features [B, F].

    Raises:
        ValueError: There is no classifier of this name.
        RuntimeError: The weights are missing or damaged.
    """
    return _load_frozen(CLASSIFIERS, name, directory)


def _load_frozen(kinds: Mapping[str, type[Module]], name: str, directory: str | Path) -> Module:
    """The module of a name, with its weights from the directory, in eval mode and frozen; errors as `load_classifier`."""
    if name not in kinds:
        raise ValueError(f"name={name!r}: must be one of {', '.join(kinds)}")
    module = kinds[name]()
    with _weights_of(directory, f"{name}.safetensors") as path:
        module.load_state_dict(load_file(path))
    return module.eval().requires_grad_(False)


def frechet_distance(images: Tensor, digit: int, directory: str | Path = WEIGHTS) -> float:
    """Frechet distance between pictures and the real digits of one class; lower is closer to the data.

    It is taken in the judge's features, projected to the first 16 principal components of the real digits of all
    classes. It grows as the number of pictures falls: compare only distances over equally many pictures.

    Args:
        images: [N, 3, H, W] float in [0, 1], at least 17 of them: with fewer the covariance is singular.
        digit: Class 0..9.
        directory: Folder of weights as `pretrain.py` writes it.

    Raises:
        ValueError: `digit` is no class, or there are too few images.
        RuntimeError: The weights are missing or damaged.
    """
    _check_digit(digit)
    judge, statistics = _judge_and_statistics(Path(directory))
    components_FK = statistics["components"]
    if len(images) <= components_FK.shape[1]:
        raise ValueError(f"images holds {len(images)} pictures: must be at least {components_FK.shape[1] + 1}; pass hundreds")
    with torch.no_grad():
        features_NF = judge.features(images.detach().float().cpu())
    projected_NK = (features_NF.double() - statistics["mean"]) @ components_FK
    real = statistics["class_means"][digit], statistics["class_covariances"][digit]
    return gaussian_frechet_distance(projected_NK.mean(dim=0), torch.cov(projected_NK.T), *real)


def gaussian_frechet_distance(mean_p: Tensor, covariance_p: Tensor, mean_q: Tensor, covariance_q: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, the quantity that FID reports.

    ||m_p - m_q||^2 + tr(C_p) + tr(C_q) - 2 tr((C_p^1/2 C_q C_p^1/2)^1/2), of means [K] and covariances [K, K]
    """
    values, vectors = torch.linalg.eigh(covariance_p)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_q @ root).clamp(min=0).sqrt().sum()
    distance = (mean_p - mean_q).square().sum() + covariance_p.trace() + covariance_q.trace() - 2 * cross
    return max(float(distance), 0.0)  # round-off may turn a distance of zero negative


@lru_cache(maxsize=2)
def _judge_and_statistics(directory: Path) -> tuple[DigitClassifier, dict[str, Tensor]]:
    """The judge and the statistics of the real digits in its features, read once: the distance is taken often."""
    judge = load_classifier("judge", directory)
    with _weights_of(directory, "statistics.safetensors") as path:
        return judge, load_file(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of diffusers and transformers, and no notes of transformers on image processors, of which there are none."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    with ExitStack() as stack:
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()
        for library in (diffusers_logging, logging):
            if library.is_progress_bar_enabled():
                stack.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        yield


@contextmanager
def _weights_of(directory: str | Path, name: str) -> Iterator[Path]:
    """The path of a part of the weights; errors in reading it say what to do."""
    try:
        yield Path(directory) / name
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        programs = {MODELS["digits-flow"]: "pretrain_flow.py", MODELS["moving-digits"]: "pretrain_moving.py"}
        program = programs.get(Path(directory), "pretrain.py")
        raise RuntimeError(
            f"the digits weights {Path(directory) / name} are missing or damaged ({error}); reinstall rlr_trainer, or make them "
            f"anew: `python examples/digits/{program} --output_dir {directory}`"
        ) from error


def _check_digit(digit: int) -> None:
    if isinstance(digit, bool) or not isinstance(digit, int) or not 0 <= digit <= 9:
        raise ValueError(f"digit={digit!r}: must be an integer from 0 to 9")
