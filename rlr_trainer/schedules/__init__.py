"""Samplers as Gaussian transitions."""

from rlr_trainer.schedules.grid import SCHEDULERS
from rlr_trainer.schedules.interpolant import InterpolantSchedule
from rlr_trainer.schedules.protocol import SamplerOptions, Schedule
from rlr_trainer.schedules.samplers import SAMPLERS, make_schedule
from rlr_trainer.schedules.windows import NOISE_WINDOWS, NoiseWindows, window_positions

__all__ = [
    "NOISE_WINDOWS",
    "SAMPLERS",
    "SCHEDULERS",
    "InterpolantSchedule",
    "NoiseWindows",
    "SamplerOptions",
    "Schedule",
    "make_schedule",
    "window_positions",
]
