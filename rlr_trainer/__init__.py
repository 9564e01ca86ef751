"""Fine-tune diffusion models on a reward with the Recursive Likelihood Ratio optimizer (arXiv:2502.00639)."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Loaded on first use, so that `import rlr_trainer.estimators` needs torch alone.
_PUBLIC = {
    "DenoisingChain": "rlr_trainer.estimators.chain",
    "EstimatorPlan": "rlr_trainer.estimators.plan",
    "GradientEstimate": "rlr_trainer.estimators",
    "PlanError": "rlr_trainer.estimators.plan",
    "RLRCallback": "rlr_trainer.observing.callbacks",
    "RLRConfig": "rlr_trainer.training.config",
    "RLRTrainer": "rlr_trainer.training.trainer",
    "RewardError": "rlr_trainer.rewards",
    "Rollout": "rlr_trainer.estimators.chain",
    "estimate_gradient": "rlr_trainer.estimators",
}

if TYPE_CHECKING:
    # "as": type checkers do not read a computed __all__
    from rlr_trainer.estimators import GradientEstimate as GradientEstimate
    from rlr_trainer.estimators import estimate_gradient as estimate_gradient
    from rlr_trainer.estimators.chain import DenoisingChain as DenoisingChain
    from rlr_trainer.estimators.chain import Rollout as Rollout
    from rlr_trainer.estimators.plan import EstimatorPlan as EstimatorPlan
    from rlr_trainer.estimators.plan import PlanError as PlanError
    from rlr_trainer.observing.callbacks import RLRCallback as RLRCallback
    from rlr_trainer.rewards import RewardError as RewardError
    from rlr_trainer.training.config import RLRConfig as RLRConfig
    from rlr_trainer.training.trainer import RLRTrainer as RLRTrainer

__all__ = ["__version__", *_PUBLIC]


# Modules that scripts of earlier versions import -> where they are now.
_MOVED = {
    "rlr_trainer.chains.linear_gaussian": "rlr_trainer.estimators.linear_gaussian",
    "rlr_trainer.demo": "rlr_trainer.digits.rewards",
    "rlr_trainer.prompts": "rlr_trainer.rollouts.prompts",
    "rlr_trainer.report": "rlr_trainer.observing.report",
}


class _Moved(ModuleType):
    """Stands under a module's earlier name, and loads it where it is now when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(_MOVED[self.__name__]), name)


for _name in _MOVED:
    sys.modules.setdefault(_name, _Moved(_name))
sys.modules.setdefault("rlr_trainer.chains", ModuleType("rlr_trainer.chains"))


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rlr_trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
