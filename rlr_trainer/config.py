"""`RLRConfig`: every option of the trainer, its unit, default and source. All checks are in `__post_init__`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import TrainingArguments

from rlr_trainer import compat
from rlr_trainer.plan import NAMED_STARTS, EstimatorPlan, PlanError

ADVANTAGE_NAMES = ("none", "leave_one_out", "normalize", "per_prompt")
RECOMPUTE_NAMES = ("recursive", "graph")
AUTO = "auto"  # value of fo_steps and ho_length: measure and choose

# Options of RLRConfig that go to EstimatorPlan under the same name.
PLAN_OPTIONS = (
    "fo_steps",
    "ho_length",
    "ho_start",
    "rest_estimator",
    "rest_num_steps",
    "rest_step_weights",
    "control_variate",
    "fo_weight",
    "ho_weight",
    "rest_weight",
    "zo_scale",
    "zo_num_perturbations",
    "zo_antithetic",
)


def _option(default: Any, help_text: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


@dataclass
class RLRConfig(TrainingArguments):
    """Options of `RLRTrainer`, beside those of `transformers.TrainingArguments`.

    An *update* is one optimizer step, a *rollout* one round of sampling. By default a rollout feeds one update:
    `per_device_train_batch_size * gradient_accumulation_steps` samples per process. With `sample_batch_size *
    sample_num_batches_per_epoch` larger than that, or `num_inner_epochs` above 1, a rollout feeds several updates, the later ones
    off-policy (as in DDPO).

    Without a dataset an epoch is one rollout, as in DDPO; with `train_dataset` an epoch is one pass over the prompts.

    Raises:
        ValueError: an option outside its range, or a combination that cannot be; names field, value, rule and way out.
    """

    # ---- estimator ----
    estimator: str = _option(
        "rlr", "Preset plan: rlr, rlr_paper, ddpo, draft, alignprop, full_bp, sqdf or es (docs/estimators.md)."
    )
    fo_steps: str | int | list[int] | tuple[int, int] | None = _option(
        None,
        "K: first-order steps at the end of the chain: an integer, [low, high] to draw it per trajectory, or 'auto' to pick the K of least "
        "measured variance before the first update. Default: preset.",
    )
    ho_length: str | int | None = _option(
        None,
        "h: length of the half-order sub-chain, 0 for none, or 'auto' for formula (8) of the paper with measured constants and "
        "memory_budget_gb. Default: preset.",
    )
    memory_budget_gb: float | None = _option(None, "Memory for the chain's steps in GB (10^9 bytes), for ho_length='auto'.")
    ho_start: list[float] | str | tuple[float, ...] | None = _option(
        None, "Start of the sub-chain: 'uniform', 'grad_norm', [first, last], or one weight per start. Default: uniform."
    )
    rest_estimator: str | None = _option(None, "Estimator of the remaining steps: lr, zo, prediction or none. Default: preset.")
    rest_num_steps: int | None = _option(
        None, "How many of the remaining steps lr visits, drawn at random and weighted by 1 / probability. Default: all."
    )
    rest_step_weights: list[float] | None = _option(
        None, "One weight per step: inclusion probabilities of rest_num_steps are proportional to them. Default: uniform."
    )
    control_variate: bool | None = _option(
        None, "Subtract the reward of the one-step prediction in likelihood-ratio terms; unbiased, differentiable rewards only."
    )
    zo_num_perturbations: int | None = _option(None, "Distinct zeroth-order perturbations per sampling batch. Default: 4.")
    zo_scale: float | None = _option(None, "Standard deviation of the parameter perturbations. Default: 0.01.")
    zo_antithetic: bool | None = _option(None, "Use every perturbation with both signs, on common noise. Default: true.")
    fo_weight: float | None = _option(None, "Factor on the first-order part; the sum is the gradient only at 1. Default: 1.")
    ho_weight: float | None = _option(None, "Factor on the half-order part. Default: 1.")
    rest_weight: float | None = _option(None, "Factor on the part of the remaining steps. Default: 1.")
    recompute: str = _option("recursive", "recursive: memory of one step for any K and h; graph: one graph per segment.")

    # ---- reward and advantage ----
    advantage: str | None = _option(
        None, "none, leave_one_out, normalize or per_prompt. Default: leave_one_out; normalize for the ddpo preset."
    )
    adv_clip_max: float | None = _option(None, "Limit of the advantage's magnitude. Default: none; 5 for the ddpo preset.")
    reward_weights: list[float] | None = _option(None, "One weight per reward function. Default: all 1.")
    num_images_per_prompt: int = _option(1, "Samples per prompt (group size); leave_one_out then compares within the group.")
    per_prompt_buffer_size: int = _option(16, "Rewards kept per prompt by advantage='per_prompt'.")
    per_prompt_min_count: int = _option(16, "Rewards a prompt needs before its own statistics are used.")
    check_reward: bool = _option(True, "Try the reward on one batch of noise pictures before the first rollout (one query each).")

    # ---- policy-gradient updates ----
    clip_range: float | None = _option(
        1e-4, "PPO clip range of the ratio of per-entry mean log-densities (as DDPO); none: unclipped."
    )
    num_inner_epochs: int = _option(1, "Passes over each rollout.")

    # ---- sampling ----
    sample_num_steps: int = _option(50, "T: denoising steps.")
    sample_eta: float = _option(1.0, "Noise of DDIM, from 0 (none) to 1 (that of DDPM).")
    sample_guidance_scale: float = _option(5.0, "Classifier-free guidance weight; 1 or less switches it off.")
    sample_batch_size: int = _option(None, "Samples per process and sampling batch. Default: per_device_train_batch_size.")
    sample_num_batches_per_epoch: int = _option(
        None, "Sampling batches per process and rollout. Default: as many as one update takes."
    )
    negative_prompt: str = _option("", "Negative prompt of every sample, unless a dataset row brings its own.")
    prompt_scales: list[int] | None = _option(
        None,
        "Diffusive Chain-of-Thought: steps at which the next, finer scale begins, e.g. [15, 35] for coarse, mid and fine; "
        "a prompt function then returns one prompt per scale, a dataset brings a column scale_prompts.",
    )
    height: int | None = _option(None, "Picture height in pixels. Default: the model's.")
    width: int | None = _option(None, "Picture width in pixels. Default: the model's.")
    shuffle_prompts: bool = _option(True, "Shuffle the prompts of train_dataset anew in every pass.")

    # ---- trained weights ----
    use_lora: bool = _option(True, "Train LoRA weights; false trains the whole network.")
    lora_r: int = _option(16, "Rank of the LoRA weights.")
    lora_alpha: int | None = _option(None, "LoRA scaling numerator. Default: lora_r.")
    lora_target_modules: list[str] | None = _option(None, "Module names that get LoRA weights. Default: the attention projections.")

    # ---- logging and output ----
    log_estimator_norms: bool = _option(
        True, "Log the gradient norm of each part (needs one copy of the trainable gradients per part)."
    )
    overwrite: bool = _option(False, "Allow an output_dir that holds another run; without it such a folder is refused.")

    # ---- TrainingArguments' defaults that do not fit reinforcement learning of a diffusion model ----
    output_dir: str = _option("rlr-output", "Folder of checkpoints, logs and the final weights.")
    learning_rate: float = _option(3e-4, "Initial learning rate of AdamW (DDPO's default).")
    weight_decay: float = _option(1e-4, "Weight decay of AdamW (DDPO's default).")
    num_train_epochs: float = _option(100, "Epochs: rollouts without a dataset, passes over the prompts with one.")
    logging_steps: float = _option(1, "Updates between two log lines.")
    save_steps: float = _option(100, "Updates between two checkpoints.")
    report_to: str | list[str] | None = _option("none", "Trackers: tensorboard, wandb, trackio, mlflow, ..., all or none.")

    def __post_init__(self) -> None:
        self._check_own_options()
        super().__post_init__()
        if self.sample_batch_size is None:
            self.sample_batch_size = self.per_device_train_batch_size
        per_update = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.sample_num_batches_per_epoch is None:
            self.sample_num_batches_per_epoch = max(1, per_update // self.sample_batch_size)
        if self.rollout_size % per_update:
            raise ValueError(
                f"sample_batch_size * sample_num_batches_per_epoch = {self.sample_batch_size} * "
                f"{self.sample_num_batches_per_epoch} = {self.rollout_size} samples per rollout must be a multiple of "
                f"per_device_train_batch_size * gradient_accumulation_steps = {self.per_device_train_batch_size} * "
                f"{self.gradient_accumulation_steps} = {per_update}, the samples of one update"
            )
        self._check_plan()

    @classmethod
    def from_trl(cls, config: Any, **options: Any) -> RLRConfig:
        """The run that a DDPOConfig or AlignPropConfig of TRL 0.23.1 describes; `options` replace what it says.

        Raises:
            ValueError: a setting that cannot be honoured, see `compat.options_of_trl_config`.
        """
        return cls(**(compat.options_of_trl_config(config) | options))

    from_ddpo = from_trl

    @property
    def rollout_size(self) -> int:
        """Samples per process and rollout."""
        return self.sample_batch_size * self.sample_num_batches_per_epoch

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        per_update = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.rollout_size // per_update * self.num_inner_epochs

    @property
    def plan(self) -> EstimatorPlan:
        """The plan that the options describe, see `make_plan`."""
        return self.make_plan()

    def make_plan(self, **chosen: Any) -> EstimatorPlan:
        """The plan that the options describe, with `chosen` in place of some of them.

        An option that is "auto" and not chosen stands for the preset's own value.

        Raises:
            PlanError: a K, h, start or subset that does not fit the chain.
        """
        options = {name: chosen.get(name, getattr(self, name)) for name in PLAN_OPTIONS}
        options = {name: None if value == AUTO else value for name, value in options.items()}
        return EstimatorPlan.from_preset(self.estimator, self.sample_num_steps, **options)

    @property
    def advantage_name(self) -> str:
        """The advantage in force: the option, or the preset's own."""
        return self.advantage or ("normalize" if self.estimator == "ddpo" else "leave_one_out")

    @property
    def advantage_limit(self) -> float | None:
        """adv_clip_max in force."""
        if self.adv_clip_max is None and self.estimator == "ddpo":
            return 5.0
        return self.adv_clip_max

    def rlr_options(self) -> dict[str, Any]:
        """The options that RLRConfig adds to TrainingArguments, name -> value (for model cards and reports)."""
        base = {f.name for f in dataclasses.fields(TrainingArguments)}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in base}

    def _check_own_options(self) -> None:
        for name in ("fo_steps", "ho_length"):
            if getattr(self, name) != AUTO:
                setattr(self, name, _numbers(name, getattr(self, name), int))
        if (self.ho_length == AUTO) != (self.memory_budget_gb is not None):
            raise ValueError(
                f"ho_length={self.ho_length!r} with memory_budget_gb={self.memory_budget_gb}: formula (8) needs both; set ho_length='auto' and "
                "memory_budget_gb, or neither"
            )
        if self.ho_start not in NAMED_STARTS:
            self.ho_start = _numbers("ho_start", self.ho_start, float)
        _check_choice("recompute", self.recompute, RECOMPUTE_NAMES)
        if self.advantage is not None:
            _check_choice("advantage", self.advantage, ADVANTAGE_NAMES)
        for name in (
            "sample_num_steps",
            "num_inner_epochs",
            "num_images_per_prompt",
            "per_prompt_buffer_size",
            "per_prompt_min_count",
            "lora_r",
        ):
            _check_positive_integer(name, getattr(self, name))
        for name in ("sample_batch_size", "sample_num_batches_per_epoch", "lora_alpha", "height", "width"):
            if getattr(self, name) is not None:
                _check_positive_integer(name, getattr(self, name))
        scales = self.prompt_scales
        if scales is not None and not (scales and all(0 < a < b for a, b in pairwise([*scales, self.sample_num_steps]))):
            raise ValueError(
                f"prompt_scales={scales}: must be increasing step numbers between 1 and sample_num_steps - 1 = {self.sample_num_steps - 1}, "
                "the first step of every scale but the coarsest"
            )
        for name in ("clip_range", "adv_clip_max"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be a positive number, or None for no clipping")
        if not 0 <= self.sample_eta <= 1:
            raise ValueError(f"sample_eta={self.sample_eta}: must lie between 0 (no noise) and 1 (the noise of DDPM)")
        if not math.isfinite(self.sample_guidance_scale):
            raise ValueError(f"sample_guidance_scale={self.sample_guidance_scale}: must be finite; 1 or less is no guidance")

    def _check_plan(self) -> None:
        plan = self.plan
        if self.sample_eta == 0 and plan.scored_steps():
            raise PlanError(
                f"sample_eta=0 with estimator={self.estimator!r}: the chain adds no noise, so its steps {plan.scored_steps()[0]} to "
                f"{plan.scored_steps()[-1]} have no likelihood ratio. Set sample_eta above 0 (1 is usual), or cover every step by "
                "first order (estimator='full_bp')"
            )
        if plan.uses_zeroth_order and self.updates_per_rollout > 1:
            raise ValueError(
                f"a zeroth-order plan needs one update per rollout, but this has {self.updates_per_rollout}: set num_inner_epochs=1 "
                "and sample_batch_size * sample_num_batches_per_epoch to the samples of one update"
            )


def _numbers(name: str, value: Any, kind: type) -> Any:
    """A number, or several in a string such as "2,5" (the command line's form of a list)."""
    if not isinstance(value, str):
        return value
    try:
        numbers = [kind(part) for part in value.strip("[]() ").split(",")]
    except ValueError:
        named = f"; or one of {', '.join(NAMED_STARTS)}" if name == "ho_start" else ""
        raise ValueError(f"{name}={value!r}: must be a number, or numbers separated by commas{named}") from None
    return numbers[0] if len(numbers) == 1 and name in ("fo_steps", "ho_length") else numbers


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")


def _check_positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
