"""Samplers as Gaussian transitions."""

from rlr_trainer.schedules.grid import SCHEDULERS
from rlr_trainer.schedules.interpolant import InterpolantSchedule
from rlr_trainer.schedules.protocol import SamplerOptions, Schedule
from rlr_trainer.schedules.samplers import SAMPLERS, make_schedule

__all__ = ["SAMPLERS", "SCHEDULERS", "InterpolantSchedule", "SamplerOptions", "Schedule", "make_schedule"]
