"""What pipelines of flow-matching models give to their scheduler."""

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from rlr_trainer.pipelines.timesteps import flow_sigmas, shift_of_tokens


def test_sigmas_fall_evenly_from_one():
    assert flow_sigmas(4) == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(("tokens", "shift"), [(100, 0.4), (300, 1.2), (200, 0.8)])
def test_the_shift_is_linear_between_the_schedulers_settings(tokens, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(base_image_seq_len=100, max_image_seq_len=300, base_shift=0.4, max_shift=1.2)
    assert shift_of_tokens(scheduler, tokens) == pytest.approx(shift, abs=1e-12)
