"""Options of `RLRConfig` that do not fit each other: refused when the config is made, by an error with the way out."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.training import keeping

if TYPE_CHECKING:
    from rlr_trainer.training.config import RLRConfig

NORMALIZING_ADVANTAGES = ("normalize", "per_prompt")
AUTO = "auto"  # value of noise_steps, fo_steps and ho_length: measure and choose


def refuse(*conflicts: tuple[bool, str]) -> None:
    """Raises ValueError with the message of the first conflict that applies."""
    for applies, message in conflicts:
        if applies:
            raise ValueError(message)


def check_noise_window(config: RLRConfig, changed: Collection[str]) -> None:
    """Refuses a window that does not fit the chain, and options of `changed` that say something about a window that there is not."""
    kind, length, steps, span = config.noise_window, config.noise_steps, config.sample_num_steps, config.noise_window_range
    moving = ("progressive",)
    users = {"noise_window_range": ("random", *moving), "noise_window_stride": moving, "noise_window_rollouts": moving}
    for name, kinds in users.items():
        if name in changed and kind not in kinds:
            raise ValueError(
                f"{name}={getattr(config, name)!r} with noise_window={kind!r}: has no effect; leave it out, or set noise_window to "
                f"{' or '.join(map(repr, kinds))}"
            )
    if kind == "fixed":
        return
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= steps:
        raise ValueError(
            f"noise_steps={length!r} with noise_window={kind!r}: must be the length of the window, a number of steps between 1 and "
            f"{steps} (sample_num_steps)"
        )
    if span is not None and not (
        isinstance(span, list | tuple)
        and len(span) == 2
        and all(type(step) is int for step in span)
        and 0 <= span[0] <= span[1] - length + 1
        and span[1] < steps
    ):
        raise ValueError(
            f"noise_window_range={span!r}: must be two step numbers between 0 and {steps - 1}, the first and the last, with room for a "
            f"window of noise_steps={length} steps"
        )


def check_combinations(config: RLRConfig) -> None:
    """Refuses options that contradict each other, or of which one would have no effect."""
    normalizes = config.advantage in (None, *NORMALIZING_ADVANTAGES)
    warmup = config.warmup_steps or getattr(config, "warmup_ratio", 0)  # transformers 5 has the first alone
    refuse(
        (
            config.lr_scheduler_type == "constant" and bool(warmup),
            f"lr_scheduler_type='constant' with a warm-up of {warmup}: a constant schedule has none; set "
            "lr_scheduler_type='constant_with_warmup', or leave the warm-up out",
        ),
        (
            (config.ho_length == AUTO) != (config.memory_budget_gb is not None),
            f"ho_length={config.ho_length!r} with memory_budget_gb={config.memory_budget_gb}: formula (8) needs both; set "
            "ho_length='auto' and memory_budget_gb, or neither",
        ),
        (
            config.log_step_norms and not config.log_estimator_norms,
            "log_step_norms=True with log_estimator_norms=False: both need the same measurement; set the latter to True",
        ),
        (
            config.ho_start == "grad_norm" and not config.log_estimator_norms,
            "ho_start='grad_norm' with log_estimator_norms=False: the starts are drawn by these norms; set the latter to True, or "
            "ho_start='uniform'",
        ),
        (
            config.reward_workers != 1 and not config.async_rewards,
            f"reward_workers={config.reward_workers}: is the number of async calls; set async_rewards=True as well",
        ),
        (
            config.reward_aggregation == "normalize_then_sum" and not normalizes,
            f"reward_aggregation='normalize_then_sum' with advantage={config.advantage!r}: it divides by no standard deviation, so both "
            "aggregations would be the same; set advantage='normalize' or 'per_prompt'",
        ),
        (
            config.lora_target_modules is not None and not config.lora_target_modules,
            f"lora_target_modules={config.lora_target_modules!r}: must name at least one module; leave it out for the family's own, or set "
            "use_lora=False to train the whole network",
        ),
    )


def check_plan(config: RLRConfig) -> None:
    """Refuses options under which the plan that they describe cannot be estimated."""
    plan = config.plan
    if plan.uses_prediction and config.normalizes_each_reward:
        raise ValueError(
            f"reward_aggregation='normalize_then_sum' with rest_estimator={plan.rest_estimator!r}, "
            f"control_variate={plan.uses_control_variate}: predictions are scored with the plain weighted sum, another objective than the "
            "normalized one; set reward_aggregation='sum_then_normalize', or choose a plan without predictions"
        )
    if (config.sample_eta == 0 or config.sampler == "ode") and plan.scored_steps():
        option = "sample_eta=0" if config.sample_eta == 0 else "sampler='ode'"
        raise PlanError(
            f"{option} with estimator={config.estimator!r}: the chain adds no noise, so its steps {plan.scored_steps()[0]} to "
            f"{plan.scored_steps()[-1]} have no likelihood ratio. Set sample_eta above 0 (unset: the sampler's own), or cover every step by "
            "first order (estimator='full_bp')"
        )
    _check_forward(config, plan)
    if config.recompute == "keep" and (reason := keeping.obstacle(config, plan)):
        raise ValueError(f"recompute='keep' with {reason}, or set recompute='recursive'")
    _check_auto_window(config, plan)
    if plan.uses_zeroth_order and config.updates_per_rollout > 1:
        raise ValueError(
            f"a zeroth-order plan needs one update per rollout, but this has {config.updates_per_rollout}: set num_inner_epochs=1 "
            "and sample_batch_size * sample_num_batches_per_epoch to the samples of one update"
        )


def _check_auto_window(config: RLRConfig, plan: EstimatorPlan) -> None:
    single = plan.rest_estimator == "lr" and plan.rest_num_steps is None and plan.ho_length <= 1
    plain = plan.silent_estimator != "ho" and plan.fo_range[0] == plan.fo_range[1] and not plan.uses_control_variate
    if config.noise_steps == AUTO and not (single and plain):
        raise PlanError(
            f"noise_steps='auto' with estimator={config.estimator!r} ({plan}): windows are measured for plans of single likelihood-ratio "
            "steps and first order; give a number, or choose rlr, rlr_black_box or ddpo without sub-chains, subsets of steps, a control "
            "variate or half-order segments"
        )


def _check_forward(config: RLRConfig, plan: EstimatorPlan) -> None:
    """Refuses what a loss on the forward process would ignore."""
    if plan.forward is None:
        return
    name = f"estimator={config.estimator!r}"
    refuse(
        (config.kl_coef is not None, f"kl_coef={config.kl_coef} with {name}: its chain has no density; leave kl_coef unset"),
        (
            config.recompute != "recursive",
            f"recompute={config.recompute!r} with {name}: it has no chain to differentiate; leave it unset",
        ),
        (
            plan.forward.loss == "nft" and config.clip_range is not None,
            f"clip_range={config.clip_range} with {name}: it has no ratio to clip; leave clip_range unset",
        ),
        (
            plan.forward.loss == "nft" and config.advantage_name not in NORMALIZING_ADVANTAGES,
            f"advantage={config.advantage_name!r} with {name}: rewards become probabilities in units of their standard deviation; set "
            "advantage to 'normalize' or 'per_prompt'",
        ),
    )
