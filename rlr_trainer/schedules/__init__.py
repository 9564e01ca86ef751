"""Samplers as Gaussian transitions."""

from rlr_trainer.schedules.ddim import DDIMSchedule
from rlr_trainer.schedules.protocol import SamplerOptions, Schedule

__all__ = ["DDIMSchedule", "SamplerOptions", "Schedule"]
