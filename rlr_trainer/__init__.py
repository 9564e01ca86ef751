"""Fine-tune diffusion models on a reward with the Recursive Likelihood Ratio optimizer (arXiv:2502.00639)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Loaded on first use, so that `import rlr_trainer.estimators` needs torch alone.
_PUBLIC = {
    "DenoisingChain": "rlr_trainer.chain",
    "EstimatorPlan": "rlr_trainer.plan",
    "GradientEstimate": "rlr_trainer.estimators",
    "PlanError": "rlr_trainer.plan",
    "RLRCallback": "rlr_trainer.callbacks",
    "RLRConfig": "rlr_trainer.config",
    "RLRTrainer": "rlr_trainer.trainer",
    "RewardError": "rlr_trainer.rewards",
    "Rollout": "rlr_trainer.chain",
    "estimate_gradient": "rlr_trainer.estimators",
}

if TYPE_CHECKING:
    from rlr_trainer.callbacks import RLRCallback
    from rlr_trainer.chain import DenoisingChain, Rollout
    from rlr_trainer.config import RLRConfig
    from rlr_trainer.estimators import GradientEstimate, estimate_gradient
    from rlr_trainer.plan import EstimatorPlan, PlanError
    from rlr_trainer.rewards import RewardError
    from rlr_trainer.trainer import RLRTrainer

__all__ = [
    "DenoisingChain",
    "EstimatorPlan",
    "GradientEstimate",
    "PlanError",
    "RLRCallback",
    "RLRConfig",
    "RLRTrainer",
    "RewardError",
    "Rollout",
    "__version__",
    "estimate_gradient",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rlr_trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
