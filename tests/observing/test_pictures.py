"""Pictures of a run."""

import numpy as np
import pytest
import torch

from rlr_trainer.observing.pictures import picture_grid


@pytest.mark.parametrize("prompt", ["x" * 12_000, "word " * 3_000])
def test_a_long_prompt_stays_below_its_picture(prompt):
    grid = np.asarray(picture_grid(torch.ones(2, 3, 32, 32), [f"0.5\n{prompt}", "short"]))
    dark = (grid < 128).any(axis=(0, 2))
    places = np.flatnonzero(dark[: len(dark) // 2])
    assert places.max() - places.min() > 100  # the line is used
    assert places.max() < 4 + 128
    assert (grid[-4:] == 255).all()
