"""Where `recompute="keep"` cannot be, and what `recompute="auto"` may choose."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.rollouts.graph_keeping import GraphKeeping

logger = logging.getLogger(__name__)


def obstacle(config: Any, plan: EstimatorPlan) -> str | None:
    """Why an `RLRConfig` does not allow to keep graphs, and what would; None if it does."""
    size, micro = config.sample_batch_size, config.per_device_train_batch_size
    reasons = (
        (config.updates_per_rollout > 1, f"{config.updates_per_rollout} updates per rollout: after the first one the graphs are of weights "
         "that are gone; set num_inner_epochs=1 and sample_batch_size * sample_num_batches_per_epoch to the samples of one update"),
        (size != micro, f"sample_batch_size={size} and per_device_train_batch_size={micro}: a graph is of a whole sampling batch; make "
         "them equal"),
        (config.offload_rollouts, "offload_rollouts=True: graphs stay on the device; set it to False"),
        (config.gradient_checkpointing, "gradient_checkpointing=True: it runs the network a second time; set it to False"),
        (plan.uses_zeroth_order, "a zeroth-order plan, which samples with other weights; set rest_estimator to 'lr' or 'none'"),
        (config.fp16, "fp16=True: it is not tried with a loss scale; set bf16=True"),
    )  # fmt: skip
    return next((reason for applies, reason in reasons if applies), None)


def launch_obstacle(accelerator: Any) -> str | None:
    """The same of how the processes were launched."""
    state, count = accelerator.state, accelerator.num_processes
    for name, kind in (("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")):
        if getattr(state, f"{name}_plugin", None) is not None:
            return f"{kind}, which takes one backward pass after each forward pass; train with one plain process"
    if count > 1:
        return f"{count} processes: data parallelism takes one backward pass after each forward pass; train with one process"
    return None


def graph_keeping(config: Any, plan: EstimatorPlan, accelerator: Any, weights: Callable[[], list[Tensor]]) -> GraphKeeping:
    """What `recompute` asks for.

    Raises:
        ValueError: "keep" where it cannot be; says why, and the way out.
    """
    if config.recompute not in ("keep", "auto"):
        return GraphKeeping(False)
    reason = obstacle(config, plan) or launch_obstacle(accelerator)
    if reason is None:
        return GraphKeeping(True if config.recompute == "keep" else None, config.sample_num_batches_per_epoch, weights)
    if config.recompute == "keep":
        raise ValueError(f"recompute='keep' with {reason}, or set recompute='recursive'")
    logger.warning("recompute='auto': chose recursive, because graphs cannot be kept with %s", reason)
    return GraphKeeping(False)
