"""The conformance kit: whether an adapter of a pipeline does what training needs of it."""

from rlr_trainer.testing.conformance import CHECKS, SLOW_CHECKS, ConformanceError, check_adapter

__all__ = ["CHECKS", "SLOW_CHECKS", "ConformanceError", "check_adapter"]
