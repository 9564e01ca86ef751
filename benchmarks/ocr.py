"""A reward that reads: the probability that a text recognizer gives to one digit.

The recognizer is the one that rapidocr ships (a PP-OCR model, Apache-2.0, weights inside the package), run by onnxruntime. It knows some 18,700
characters and has never seen these digits. `pip install 'rlr-trainer[benchmark]'` installs both; nothing is downloaded when it runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEIGHT, MARGIN = 48, 4  # of the recognizer's input, in pixels
BATCH = 8  # a picture takes 6.5 ms of one core in batches of 8, 9.2 ms alone, 7.2 ms in batches of 32
Recognizer = Callable[[Tensor], Tensor]


def as_page(images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1], white on black, as the recognizer takes them: [B, 3, 48, 48] in [-1, 1], black on white."""
    edge = HEIGHT - 2 * MARGIN
    dark = F.interpolate(1 - images.float().clamp(0, 1), size=(edge, edge), mode="bilinear", align_corners=False)
    return 2 * F.pad(dark, (MARGIN,) * 4, value=1.0) - 1


def text_probability(probabilities: Tensor, text: list[int]) -> Tensor:
    """Probability [B] that the whole text is this one, in the model of connectionist temporal classification.

    Sum over all ways to write the text with blanks between and repeats of its characters (Graves et al. 2006, equation 3).

    Args:
        probabilities: [B, S, C], of every character at every place; character 0 is the blank.
        text: indices of its characters, none of them the blank.
    """
    batch, places, _ = probabilities.shape
    needed = [0, *dict.fromkeys(text)]  # no path has another character; most of the time would go to their logarithms
    logs = probabilities[..., needed].double().clamp(min=1e-30).log().transpose(0, 1)
    targets, lengths = torch.tensor([[needed.index(character) for character in text]] * batch), torch.full((batch,), len(text))
    return (-F.ctc_loss(logs, targets, torch.full((batch,), places), lengths, reduction="none")).exp().float()


@lru_cache(maxsize=1)
def load_recognizer() -> tuple[Recognizer, list[str]]:
    """rapidocr's recognizer on one thread, and its characters.

    Returns:
        Pages [B, 3, 48, W] -> probabilities [B, S, C] of every character at every place, character 0 being the blank; the C characters.

    Raises:
        ImportError: rapidocr or onnxruntime is not installed.
        RuntimeError: This version of rapidocr does not ship one recognizer.
    """
    package = importlib.util.find_spec("rapidocr")
    if package is None or package.origin is None or importlib.util.find_spec("onnxruntime") is None:
        raise ImportError(
            "the task 'ocr' needs rapidocr and onnxruntime: pip install 'rlr-trainer[benchmark]', in the environment of TRL 0.23.1 too"
        )
    import onnxruntime

    folder = Path(package.origin).parent / "models"
    found = sorted(folder.glob("*rec*.onnx"))
    if len(found) != 1:
        raise RuntimeError(f"{folder} has {len(found)} recognizers (*rec*.onnx), expected one: rapidocr 3.10 has one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(found[0]), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    characters = ["", *session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]
    return lambda pages: torch.from_numpy(session.run(None, {name: pages.numpy()})[0]), characters


def ocr_reward(digit: int) -> Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Tensor]:
    """Probability [B] that a picture reads as `digit` and nothing else; a black box, without a gradient."""
    recognize, characters = load_recognizer()
    text = [characters.index(str(digit))]

    @torch.no_grad()
    def read(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        pages = as_page(images.detach().cpu()).split(BATCH)
        return torch.cat([text_probability(recognize(page), text) for page in pages]).to(images.device)

    return read
