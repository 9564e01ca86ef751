"""Samplers as Gaussian transitions."""

from rlr_trainer.schedules.ddim import DDIMSchedule
from rlr_trainer.schedules.protocol import Schedule

__all__ = ["DDIMSchedule", "Schedule"]
