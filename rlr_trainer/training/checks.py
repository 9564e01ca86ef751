"""Options that do not fit the rewards, the data or the launcher: refused, by a ValueError with the way out, before any long work."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rlr_trainer.estimators.first_order import NonDifferentiableRewardError
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.rewards.interface import Rewards
from rlr_trainer.rollouts.prompts import DatasetPrompts
from rlr_trainer.rollouts.sampler import conditions_of
from rlr_trainer.training.combinations import refuse
from rlr_trainer.training.config import RLRConfig
from rlr_trainer.training.evaluator import EvalPrompts, Evaluator

logger = logging.getLogger(__name__)


def is_sharded(accelerator: Any) -> bool:
    """Whether FSDP or DeepSpeed hold the weights."""
    return any(getattr(accelerator.state, f"{kind}_plugin", None) is not None for kind in ("fsdp", "deepspeed"))


def check_device(config: RLRConfig) -> None:
    """Refuses fp16 on a CPU, where its networks would meet inputs of another precision."""
    refuse(
        (
            config.fp16 and config.device.type == "cpu",
            "fp16=True on a CPU: needs an accelerator; leave fp16 unset, or set bf16=True",
        )
    )


def check_launch(config: RLRConfig, plan: EstimatorPlan, shardable: bool, accelerator: Any) -> None:
    """Refuses what is not computed with FSDP or DeepSpeed."""
    deepspeed, fsdp = (getattr(accelerator.state, f"{kind}_plugin", None) for kind in ("deepspeed", "fsdp"))
    stage = getattr(deepspeed, "zero_stage", 2)
    version, kind = getattr(fsdp, "fsdp_version", 2), getattr(fsdp, "state_dict_type", "FULL_STATE_DICT")
    norms = "log_step_norms=True" if config.log_step_norms else "ho_start='grad_norm'" if plan.ho_start == "grad_norm" else ""
    plain = "or use plain data parallelism"
    refuse(
        (stage != 2, f"zero_stage={stage}: DeepSpeed is used with stage 2 alone; set zero_stage: 2, or use FSDP2"),
        (version != 2, f"fsdp_version={version}: FSDP 1 flattens trained and other weights into one; set fsdp_version: 2"),
        (
            "FULL_STATE_DICT" not in str(kind),
            f"fsdp_state_dict_type={getattr(kind, 'name', kind)}: resuming from it loses the optimizer's state in some versions of "
            "accelerate; set fsdp_state_dict_type: FULL_STATE_DICT",
        ),
        (
            (fsdp or deepspeed) is not None and plan.uses_zeroth_order,
            f"rest_estimator={plan.rest_estimator!r} with {'FSDP' if deepspeed is None else 'DeepSpeed'}: it needs whole weights, and a "
            f"gradient beside that of the backward passes; set rest_estimator to 'lr' or 'none', {plain}",
        ),
        (
            fsdp is not None and plan.uses_prediction,
            "the one-step prediction with FSDP: it calls the network with other weights than its own, which are spread over the processes; "
            f"set control_variate=False and rest_estimator to 'lr' or 'none', {plain}",
        ),
        (
            fsdp is not None and bool(norms),
            f"{norms} with FSDP: norms of single steps are not measured; set ho_start='uniform' and log_step_norms=False, {plain}",
        ),
        (
            deepspeed is not None and (config.fp16 or config.bf16),
            "fp16 and bf16 with DeepSpeed: its engine would also keep the trained weights in them; leave both unset, or use plain data "
            "parallelism or FSDP2",
        ),
        (
            is_sharded(accelerator) and not shardable,
            "FSDP or DeepSpeed with two denoisers: each step uses one of them, and the other's sharded weights would miss their gradients; "
            "use plain data parallelism",
        ),
    )


def check_rewards(rewards: Rewards, config: RLRConfig, plan: EstimatorPlan, processes: int, evaluates: bool) -> None:
    """Refuses group-wise and async rewards where they cannot work.

    Args:
        evaluates: whether these rewards are to score an eval_dataset too.

    Raises:
        ValueError, NonDifferentiableRewardError: names the options and the way out.
    """
    reason = rewards.without_graph()
    if plan.needs_differentiable_reward and reason is not None:
        raise NonDifferentiableRewardError(
            f"estimator={config.estimator!r} needs the reward's gradient, but {reason}, or choose a plan that needs none: "
            f"estimator='rlr_black_box', or fo_steps=0 with rest_estimator='lr'{rewards.of_list}"
        )
    group, size = config.num_images_per_prompt, config.sample_batch_size
    grouped = rewards.needs_groups
    refuse(
        (
            grouped and group < 2,
            f"a group-wise reward compares pictures of one prompt, but num_images_per_prompt={group}: set it to 2 or more",
        ),
        (
            grouped and processes > 1 and size % group != 0,
            f"sample_batch_size={size} on {processes} processes: a group of num_images_per_prompt={group} pictures would be spread over "
            f"processes, and a group-wise reward needs it in one; make sample_batch_size a multiple of {group}",
        ),
        (
            grouped and evaluates,
            "a group-wise reward cannot score an eval_dataset, of which every prompt is sampled once: pass an "
            "eval_reward_function that scores pictures one by one, or leave eval_dataset out",
        ),
    )


def check_batches(config: RLRConfig, plan: EstimatorPlan, processes: int) -> None:
    """Refuses batch sizes that groups of a prompt, or pairs of perturbations, do not divide."""
    group, size, zeroth = config.num_images_per_prompt, config.sample_batch_size, plan.uses_zeroth_order
    samples, batch = config.rollout_size * processes, size * processes
    needed = plan.zo_num_perturbations * (2 if plan.zo_antithetic else 1)
    refuse(
        (
            samples % group != 0,
            f"num_images_per_prompt={group}: must divide the samples of a rollout over all processes, {samples}; change it or the batch size",
        ),
        (
            zeroth and batch % needed != 0,
            f"zo_num_perturbations={plan.zo_num_perturbations} with zo_antithetic={plan.zo_antithetic} needs a sampling batch "
            f"(sample_batch_size * processes = {batch}) that is a multiple of {needed}; change one of them",
        ),
        (
            zeroth and plan.zo_antithetic and (size % 2 != 0 or (group > 1 and group % 2 != 0)),
            f"zo_antithetic=True pairs samples of one prompt: sample_batch_size={size} and num_images_per_prompt={group} must be even "
            "(num_images_per_prompt may be 1)",
        ),
    )


def check_best_metric(config: RLRConfig, evaluator: Evaluator, prompts: EvalPrompts | None) -> None:
    """Refuses a `metric_for_best_model` that the evaluations of the run will not have; Trainer would find out at the first one."""
    metric = config.metric_for_best_model
    if metric is None or prompts is None or config.eval_strategy == "no":
        return
    sources = {f"eval_{name}": rows for name, rows in prompts.items()} if isinstance(prompts, dict) else {"eval": prompts}
    repeats = config.eval_images_per_prompt
    known = [f"{prefix}_{name}" for prefix, rows in sources.items() for name in evaluator.metric_names(rows, repeats)]
    if (metric if metric.startswith("eval_") else f"eval_{metric}") not in known:
        raise ValueError(
            f"metric_for_best_model={metric!r} is none of the metrics of an evaluation: {', '.join(known)}; choose one of them, or override "
            "evaluate() to add it"
        )


def check_conditions(names: Sequence[str], *sources: Any) -> None:
    """Refuses datasets whose first row lacks what the pipeline is conditioned on beside the prompt; functions show it when they are called."""
    for source in sources:
        for one in source.values() if isinstance(source, Mapping) else [source]:
            if isinstance(one, DatasetPrompts):
                conditions_of(one.peek(1)[0], names)


def check_optimizer(optimizer: Any, params: Mapping[str, nn.Parameter]) -> None:
    """Refuses an optimizer given to the trainer that would train nothing, and warns of one that leaves trained `params` out."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in params.items() if id(parameter) not in held]
    if len(missing) == len(params):
        raise ValueError(
            f"optimizers: the {type(optimizer).__name__} has none of the {len(params)} trained parameters, so nothing would be learnt. LoRA "
            "weights do not exist before the trainer attaches them: attach them first (pipeline.unet.add_adapter(LoraConfig(...))) and give the "
            "optimizer those that require a gradient; or set optim and optim_args; or override create_optimizer"
        )
    if missing:
        logger.warning("optimizers: %d of %d trained parameters are in no group, such as %s", len(missing), len(params), missing[0])
