"""The bundled Stable Diffusion pipeline: a tiny model of the real classes, which is trained."""

from __future__ import annotations

import copy
import functools
from typing import Any

from rlr_trainer import digits


@functools.cache
def _master() -> Any:
    return digits.load_pipeline()


def make_pipeline() -> Any:
    """A fresh `StableDiffusionPipeline`, 32 x 32 pixels."""
    return copy.deepcopy(_master())
