"""Weights that FSDP2 spreads over the processes: what can be trained with them, and how they are written and read."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.training.config import RLRConfig

logger = logging.getLogger(__name__)


def check_sharding(config: RLRConfig, plan: EstimatorPlan, accelerator: Any) -> None:
    """Refuses what is not computed with FSDP or DeepSpeed, and switches off the norms of the parts, which are not seen there.

    Raises:
        ValueError: names the option and the way out.
    """
    state = accelerator.state
    if getattr(state, "deepspeed_plugin", None) is not None:
        _check_deepspeed(config, plan, state.deepspeed_plugin)
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version}: FSDP 1 flattens weights that are trained and weights that are not into one; set "
            "fsdp_version: 2"
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type={getattr(plugin.state_dict_type, 'name', plugin.state_dict_type)}: resuming from it loses the optimizer's "
            "state in some versions of accelerate; set fsdp_state_dict_type: FULL_STATE_DICT"
        )
    reason = "calls the network with other weights than its own, which are spread over the processes"
    refused = [
        (plan.uses_zeroth_order, f"rest_estimator={plan.rest_estimator!r}", reason, "set rest_estimator to 'lr' or 'none'"),
        (plan.uses_prediction, "the one-step prediction", reason, "set control_variate=False and rest_estimator to 'lr' or 'none'"),
        (plan.ho_start == "grad_norm", "ho_start='grad_norm'", "needs norms of single steps", "set ho_start='uniform'"),
        (config.log_step_norms, "log_step_norms=True", "needs norms of single steps", "leave it out"),
    ]
    for applies, what, why, remedy in refused:
        if applies:
            raise ValueError(f"{what} with FSDP: it {why}; {remedy}, or use plain data parallelism")
    if config.log_estimator_norms:
        logger.warning("log_estimator_norms: the gradient norms of the parts are not measured with FSDP, and not logged")
        config.log_estimator_norms = False


def _check_deepspeed(config: RLRConfig, plan: EstimatorPlan, plugin: Any) -> None:
    stage = plugin.zero_stage
    if stage != 2:
        raise ValueError(
            f"zero_stage={stage}: DeepSpeed is used with stage 2 alone; set zero_stage: 2, or use FSDP2 to spread the weights"
        )
    if plan.uses_zeroth_order:
        raise ValueError(
            f"rest_estimator={plan.rest_estimator!r} with DeepSpeed: its engine takes no gradient beside those of its own backward passes; set "
            "rest_estimator to 'lr' or 'none', or use plain data parallelism"
        )
    if config.fp16 or config.bf16:
        raise ValueError(
            "fp16 and bf16 with DeepSpeed: its engine would also keep the trained weights in them; leave both unset, or use plain data "
            "parallelism or FSDP2"
        )


@contextlib.contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Inside, `module.state_dict()` has the trained weights put together, on the CPU. All processes must enter.

    Nothing is exchanged between processes inside, so one of them may write a file there.
    """
    found = {name: p for name, p in module.named_parameters() if p.requires_grad and isinstance(p, DTensor)}
    whole = {name: parameter.full_tensor().detach().cpu() for name, parameter in found.items()}

    def replace(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state.update({prefix + name: tensor for name, tensor in whole.items()})

    handle = module.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def spread_when_loaded(module: nn.Module) -> Iterator[None]:
    """Inside, `module.load_state_dict` takes whole tensors for weights that are spread over the processes. All must enter and load."""
    parameters = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}

    def spread(owner: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, parameter in parameters.items():
            value: Tensor | None = state.get(prefix + name)
            if value is not None and not isinstance(value, DTensor):
                value = value.to(device=parameter.device, dtype=parameter.dtype)
                state[prefix + name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)

    handle = module.register_load_state_dict_pre_hook(spread)
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()
