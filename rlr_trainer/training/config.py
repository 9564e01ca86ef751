"""`RLRConfig`: every option of the trainer, its unit, default and source; `__post_init__` checks them."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from rlr_trainer.estimators.plan import NAMED_STARTS, PLAN_OPTIONS, EstimatorPlan
from rlr_trainer.estimators.presets import PRESETS
from rlr_trainer.schedules import NOISE_WINDOWS, SamplerOptions, window_positions
from rlr_trainer.training import combinations
from rlr_trainer.training.combinations import AUTO, NORMALIZING_ADVANTAGES
from rlr_trainer.training.trl import configs
from rlr_trainer.training.trl import names as replaced

logger = logging.getLogger(__name__)

CHOICES = {
    "recompute": ("recursive", "graph", "keep", "auto"),
    "noise_window": NOISE_WINDOWS,
    "reward_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "on_reward_error": ("raise", "skip"),
    "advantage": ("none", "leave_one_out", "normalize", "per_prompt"),
}
COUNTS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "sample_num_steps", "num_inner_epochs", "lora_r"),
    *("noise_window_stride", "noise_window_rollouts"),
    *("num_images_per_prompt", "per_prompt_buffer_size", "per_prompt_min_count", "reward_workers", "eval_images_per_prompt"),
)
OPTIONAL_COUNTS = (
    *("sample_batch_size", "sample_num_batches_per_epoch", "lora_alpha", "height", "width", "num_frames"),
    *("reward_batch_size", "log_images_steps"),
)
# Option -> (which finite numbers it may be, in words); None where the option allows it.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "clip_range": (lambda value: value > 0, "be a positive number, or None for no clipping"),
    "adv_clip_max": (lambda value: value > 0, "be a positive number, or None for no clipping"),
    "reward_timeout": (lambda value: value > 0, "be a positive number of seconds, or None for no limit"),
    "ema_decay": (lambda value: 0 < value < 1, "lie between 0 and 1, for instance 0.99, or be None for no averaging"),
    "kl_coef": (lambda value: value >= 0, "be 0 (log only), a positive number, or None for no reference policy"),
    "sample_eta": (lambda value: value >= 0, "be 0 (no noise) or more, or None for the sampler's own level"),
    "sample_guidance_rescale": (lambda value: 0 <= value <= 1, "lie between 0 (none) and 1 (the conditional output's deviation)"),
    "sample_guidance_scale": (lambda value: True, "be finite; 1 or less is no guidance"),
    "max_steps": (lambda value: value != 0, "be a number of updates, or -1 to train for num_train_epochs"),
}


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@replaced.explains_options
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

    save_steps_chosen = False  # whether save_steps was given; no field: it is no option
    _from_trl = False  # whether output_dir was made of a TRL config; no field: it is no option

    # Of a union of three types and more, transformers.HfArgumentParser and trl.TrlParser take the second: it must be str.

    # ---- estimator ----
    estimator: str = _option(
        "rlr",
        "Preset plan: rlr, rlr_black_box, rlr_paper, ddpo, flow_grpo, mixgrpo, draft, alignprop, full_bp, sqdf, es, awm or nft "
        "(docs/estimators.md).",
    )
    fo_steps: int | str | list[int] | tuple[int, int] | None = _option(
        None,
        "K: first-order steps at the end of the chain: an integer, [low, high] to draw it per sampling batch, or 'auto' to pick the K of least "
        "measured variance before the first update. Default: preset.",
    )
    ho_length: str | int | None = _option(
        None,
        "h: length of the half-order sub-chain, 0 for none, or 'auto' for formula (8) of the paper with measured constants and "
        "memory_budget_gb. Default: preset.",
    )
    memory_budget_gb: float | None = _option(None, "Memory for the chain's steps in GB (10^9 bytes), for ho_length='auto'.")
    ho_start: list[int] | str | tuple[int, int] | None = _option(
        None, "Start of the sub-chain: 'uniform', 'grad_norm', or [first, last], two step numbers. Default: uniform."
    )
    ho_start_weights: list[float] | str | tuple[float, ...] | None = _option(
        None, "One weight per admissible start of the sub-chain, in place of ho_start: starts are drawn in proportion to them."
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
    silent_estimator: str | None = _option(
        None,
        "Of steps without noise that the plan would give a likelihood ratio: none leaves their share out (biased), ho covers them by half-order "
        "segments that end at the next step with noise (unbiased, noisier). Default: they are refused.",
    )
    zo_antithetic: bool | None = _option(None, "Use every perturbation with both signs, on common noise. Default: true.")
    fo_weight: float | None = _option(None, "Factor on the first-order part; the sum is the gradient only at 1. Default: 1.")
    ho_weight: float | None = _option(None, "Factor on the half-order part. Default: 1.")
    rest_weight: float | None = _option(None, "Factor on the part of the remaining steps. Default: 1.")
    forward_times: int | None = _option(
        None,
        "Noise levels at which awm and nft match every sample. Default, as their authors: 6 for awm; for nft 0.99 of the steps, rounded down.",
    )
    nft_beta: float | None = _option(None, "nft: how far its two implicit policies are from the old one. Default: 1.")
    old_policy_decay: list[float] | str | tuple[float, float, float] | None = _option(
        None,
        "nft: [flat, rate, limit]: the old policy, which samples, keeps min(rate * (n - flat), limit) of itself after n updates, and takes the "
        "rest from the trained one. Default: 0,0.001,0.5; its authors also use 75,0.0075,0.999.",
    )
    recompute: str = _option(
        "recursive",
        "recursive: memory of one step for any K and h; graph: one graph per segment; keep: the graphs of all visited steps stay from sampling, "
        "which saves their second forward pass (one update per rollout, one process); auto: keep or recursive, by the memory that is free.",
    )

    # ---- reward and advantage ----
    advantage: str | None = _option(
        None,
        "none, leave_one_out, normalize or per_prompt. Default: leave_one_out; normalize for ddpo, flow_grpo, mixgrpo, rlr_black_box, awm "
        "and nft.",
    )
    adv_clip_max: float | None = _option(
        None, "Limit of the advantage's magnitude. Default: none; 5 for ddpo, flow_grpo, mixgrpo, rlr_black_box, awm and nft."
    )
    reward_weights: list[float] | None = _option(None, "One weight per reward function. Default: all 1.")
    reward_aggregation: str = _option(
        "sum_then_normalize",
        "sum_then_normalize: the advantage of the weighted sum of the rewards; normalize_then_sum: the weighted sum of each reward's own "
        "normalized advantage (GDPO).",
    )
    reward_batch_size: int | None = _option(None, "Pictures per call of a reward function. Default: the sampling batch.")
    reward_timeout: float | None = _option(None, "Seconds that one call of a reward function may take. Default: no limit.")
    on_reward_error: str = _option(
        "raise", "raise: a reward that fails ends the run; skip: go on without the samples of that call, and count them."
    )
    async_rewards: bool = _option(
        False, "Compute rewards in threads while the next batch is sampled; only for plans that need no reward gradient."
    )
    reward_workers: int = _option(1, "Reward calls at a time with async_rewards; above 1 the functions must be thread-safe.")
    num_images_per_prompt: int = _option(1, "Samples per prompt (group size); leave_one_out then compares within the group.")
    per_prompt_buffer_size: int = _option(16, "Rewards kept per prompt by advantage='per_prompt'.")
    per_prompt_min_count: int = _option(16, "Rewards a prompt needs before its own statistics are used.")
    check_reward: bool = _option(True, "Try the reward on one batch of noise pictures before the first rollout (one query each).")

    # ---- policy-gradient updates ----
    clip_range: float | None = _option(
        1e-4,
        "PPO clip range of the ratio of per-entry mean log-densities (as DDPO); none: unclipped. awm: 1 if unset; nft has no ratio.",
    )
    num_inner_epochs: int = _option(1, "Passes over each rollout.")

    kl_coef: float | None = _option(
        None,
        "Weight of the Kullback-Leibler divergence from the reference policy (the model before LoRA, or a copy of it), in units of the "
        "advantage per nat of the whole chain. 0 only logs the metric kl. Default: neither; flow_grpo: 0.04 / T.",
    )
    ema_decay: float | None = _option(
        None, "Decay of an average of the trained weights, which evaluation, pictures and the saved result then use. Default: none."
    )

    # ---- sampling ----
    sample_num_steps: int = _option(50, "T: denoising steps.")
    sampler: str = _option(
        "auto",
        "How the chain is sampled: ddim, ddpm, euler_ancestral, dpm_sde, lcm, tcd, scm, flow_cps, flow_sde, dance_sde or ode, on the time "
        "steps of the pipeline's scheduler; auto: that of the scheduler, flow_cps for flow models (docs/samplers.md). awm, nft: ode if unset.",
    )
    sample_eta: float | None = _option(
        None,
        "Noise level of the sampler, in its own unit; 0 is none. Default: 1 for ddim, 0.8 flow_cps, 0.7 flow_sde, 0.3 dance_sde and tcd.",
    )
    noise_steps: list[int] | str | int | tuple[int, int] | None = _option(
        None,
        "Steps that add noise: n for the first n, [first, last], or 'auto' to choose n, and with fo_steps='auto' K, by a measurement that costs "
        "about five updates; the others are deterministic. Default: all; rlr_black_box: the first three of ten; flow_grpo: all but the last; "
        "mixgrpo: 4 of 25.",
    )
    noise_window: str = _option(
        "fixed",
        "fixed: the noise stays in noise_steps; random: a window of noise_steps steps is drawn for every rollout; progressive: it starts at the "
        "noisy end and moves on every noise_window_rollouts rollouts. Pictures outside training have the noise in the first window.",
    )
    noise_window_range: list[int] | str | None = _option(
        None,
        "First and last step between which a random or progressive window lies. Default: random, the first half; progressive, all.",
    )
    noise_window_stride: int = _option(1, "Steps by which a progressive window moves.")
    noise_window_rollouts: int = _option(25, "Rollouts that a progressive window stays where it is.")
    sample_guidance_scale: float = _option(
        5.0, "Guidance weight: of classifier-free guidance, off at 1 or less, or the one that the network takes as an input."
    )
    sample_guidance_rescale: float = _option(
        0.0, "Share of the rescaled output in the guided one, as the pipeline's guidance_rescale (Stable Diffusion, SDXL)."
    )
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
    num_frames: int | None = _option(None, "Frames of a video; for pipelines that make pictures it stays unset.")
    shuffle_prompts: bool = _option(True, "Shuffle the prompts of train_dataset anew in every pass.")

    offload_text_encoders: bool = _option(
        False, "Keep text encoders in CPU memory but for the moment in which they encode prompts; encoded prompts are kept (1 GiB)."
    )
    decode_in_chunks: bool = _option(
        False,
        "Decode videos a chunk of frames at a time, with the decoder's graph of one chunk in memory; costs one to two more decodings.",
    )
    offload_rollouts: bool = _option(False, "Keep sampled chains in CPU memory until their update.")

    # ---- trained weights ----
    use_lora: bool = _option(True, "Train LoRA weights; false trains the whole network.")
    lora_r: int = _option(16, "Rank of the LoRA weights.")
    lora_alpha: int | None = _option(None, "LoRA scaling numerator. Default: lora_r.")
    lora_target_modules: list[str] | None = _option(
        None, "Module names that get LoRA weights. Default: the family's, as in diffusers' own examples."
    )

    # ---- logging and output ----
    log_estimator_norms: bool = _option(
        True, "Log the gradient norm of each part (needs one copy of the trainable gradients per part)."
    )
    log_step_norms: bool = _option(
        False, "Log the gradient norm of every denoising step, estimator/step_grad_norm/<step>; needs log_estimator_norms."
    )
    num_log_images: int = _option(
        8,
        "Pictures of fixed prompts and noise, scored, before, during and after training, for samples/ and the trackers; 0 for none.",
    )
    log_images_steps: int | None = _option(
        None, "Updates between two such sets of pictures. Default: a quarter of the run, 100 at most."
    )
    eval_images_per_prompt: int = _option(1, "Pictures per prompt of eval_dataset; their noise is the same in every evaluation.")
    overwrite: bool = _option(False, "Allow an output_dir that holds another run; without it such a folder is refused.")

    # ---- TrainingArguments' defaults that do not fit reinforcement learning of a diffusion model ----
    output_dir: str = _option("rlr-output", "Folder of checkpoints, logs and the final weights.")
    learning_rate: float = _option(
        3e-4, "Learning rate of AdamW: that of DDPO and Flow-GRPO for LoRA weights; without LoRA take about a tenth."
    )
    lr_scheduler_type: SchedulerType | str = _option(
        "constant",
        "Schedule of the learning rate: constant, constant_with_warmup, linear (falls to 0 at the end of the run), cosine, and others of "
        "transformers.",
    )
    weight_decay: float = _option(1e-4, "Weight decay of AdamW (DDPO's default).")
    num_train_epochs: float = _option(100, "Epochs: rollouts without a dataset, passes over the prompts with one.")
    logging_steps: float = _option(1, "Updates between two log lines.")
    save_steps: float = _option(
        None, "Updates between two checkpoints. Default: a quarter of the run, 100 at most; the last update is always saved."
    )
    report_to: list[str] | str | None = _option("none", "Trackers: tensorboard, wandb, trackio, mlflow, ..., all or none.")

    def __post_init__(self) -> None:
        self._changed = tuple(f.name for f in dataclasses.fields(self) if f.init and getattr(self, f.name) != _default(f))
        for line in replaced.check_options({name: getattr(self, name) for name in self._changed}):
            logger.warning(line)
        self._check_own_options()
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0  # how transformers 5 writes "no limit"
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_reward"  # Trainer's default is a loss, which no evaluation here has
        self.save_steps_chosen = self.save_steps is not None
        if self.save_steps is None:
            self.save_steps = 100  # until the length of the run is known
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
        combinations.check_plan(self)

    @classmethod
    def from_trl(cls, config: Any, **options: Any) -> RLRConfig:
        """The run that a DDPOConfig or AlignPropConfig of TRL 0.23.1 describes; `options` replace what it says.

        Raises:
            ValueError: a setting that cannot be honoured, see `configs.options_of_trl_config`.
        """
        converted = cls(**(configs.options_of_trl_config(config) | options))
        setattr(converted, "_from_trl", "output_dir" not in options)  # noqa: B010  # no field: it is no option
        if configs.trl_config_kind(config) == converted.estimator == "ddpo":
            # the trainer, which knows the latents' size, brings them to the unit of its gradient
            configs.mark_mean_density(converted, {"max_grad_norm", "adam_epsilon"} - options.keys())
        return converted

    from_ddpo = from_trl

    @property
    def output_dir_is_default(self) -> bool:
        """Whether nobody chose `output_dir` by name: then another run in it is no reason to refuse."""
        return "output_dir" not in self._changed or self._from_trl

    @property
    def device(self) -> Any:
        """Trainer's; of a process on a CPU plain "cpu", where accelerate numbers them and transformers 4 cannot load an optimizer."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

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
    def sampler_options(self) -> SamplerOptions:
        """How the chain is sampled, see `make_sampler_options`."""
        return self.make_sampler_options()

    def make_sampler_options(self, **chosen: Any) -> SamplerOptions:
        """How the chain is sampled, with the `noise_steps` of `chosen`; while they are "auto" and not chosen, every step adds noise."""
        noise_steps = chosen.get("noise_steps", self.noise_steps) if self.noise_window == "fixed" else self.noise_windows[0]
        return SamplerOptions(self.sample_num_steps, self.sample_eta, self.sampler, None if noise_steps == AUTO else noise_steps)

    @property
    def noise_windows(self) -> list[tuple[int, int]]:
        """First and last step of every window in which a rollout may have its noise; empty where the noise stays in `noise_steps`."""
        if self.noise_window == "fixed":
            return []
        length: Any = self.noise_steps
        span: Any = self.noise_window_range or self._default_window_range()
        first, last = span
        return window_positions(length, first, last, self.noise_window_stride)

    def _default_window_range(self) -> tuple[int, int]:
        length: Any = self.noise_steps
        half = (self.sample_num_steps + 1) // 2
        return 0, (max(half, length) if self.noise_window == "random" else self.sample_num_steps) - 1

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
        """The advantage in force: the option, or the preset's own; normalize where rewards are normalized before they are summed."""
        if self.advantage is None and self.reward_aggregation == "normalize_then_sum":
            return "normalize"
        return self.advantage or PRESETS[self.estimator].advantage

    @property
    def normalizes_each_reward(self) -> bool:
        """Whether every reward is normalized by itself before they are summed."""
        return self.reward_aggregation == "normalize_then_sum" and self.advantage_name in NORMALIZING_ADVANTAGES

    @property
    def advantage_limit(self) -> float | None:
        """adv_clip_max in force."""
        return PRESETS[self.estimator].adv_clip_max if self.adv_clip_max is None else self.adv_clip_max

    def rlr_options(self) -> dict[str, Any]:
        """The options that RLRConfig adds to TrainingArguments, name -> value (for model cards and reports)."""
        base = {f.name for f in dataclasses.fields(TrainingArguments)}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in base}

    def changed_options(self) -> dict[str, Any]:
        """The options that were given another value than their default, name -> value; those of TrainingArguments too, tokens masked."""
        values = self.to_dict()
        return {name: values[name] for name in self._changed}

    def _check_own_options(self) -> None:
        self._check_types()
        if not self.output_dir:
            raise ValueError(f"output_dir={self.output_dir!r}: must be a folder; leave it out for the default")
        for name in ("fo_steps", "ho_length"):
            if getattr(self, name) != AUTO:
                setattr(self, name, _numbers(name, getattr(self, name), int))
        if self.ho_start not in NAMED_STARTS:
            self.ho_start = _numbers("ho_start", self.ho_start, int)
        self.ho_start_weights = _numbers("ho_start_weights", self.ho_start_weights, float)
        if self.noise_steps != AUTO:
            self.noise_steps = _numbers("noise_steps", self.noise_steps, int)
        self.old_policy_decay = _numbers("old_policy_decay", self.old_policy_decay, float)
        self.noise_window_range = _numbers("noise_window_range", self.noise_window_range, int)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "advantage" and value is None):
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")
        for name in (*COUNTS, *(name for name in OPTIONAL_COUNTS if getattr(self, name) is not None), "num_log_images"):
            value, least = getattr(self, name), int(name != "num_log_images")
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")
        for name, (allows, rule) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and allows(value)):
                raise ValueError(f"{name}={value}: must {rule}")
        for name, value in PRESETS[self.estimator].sampling(self.sample_num_steps).items() if self.estimator in PRESETS else ():
            if name not in self._changed:
                setattr(self, name, value)
        scales = self.prompt_scales
        if scales is not None and not (scales and all(0 < a < b for a, b in pairwise([*scales, self.sample_num_steps]))):
            raise ValueError(
                f"prompt_scales={scales}: must be increasing step numbers between 1 and sample_num_steps - 1 = {self.sample_num_steps - 1}, "
                "the first step of every scale but the coarsest"
            )
        combinations.check_noise_window(self, self._changed)
        combinations.check_combinations(self)

    def _check_types(self) -> None:
        """Refuses text where an option is a number, a truth value or a list: "false" counts as true in Python, "1e-3" fails far later."""
        for name, kinds in _kinds().items():
            value = getattr(self, name)
            if isinstance(value, str) and kinds and kinds <= {int, float, bool, list, tuple}:
                wanted = "True or False, without quotes" if bool in kinds else "a number, without quotes"
                wanted = f"a list, such as [{value!r}]" if kinds <= {list, tuple} else wanted
                raise ValueError(f"{name}={value!r}: is text, but must be {wanted}")


@functools.cache
def _kinds() -> dict[str, set[Any]]:
    """The types that every option may have, beside None."""
    kinds = {}
    for name, hint in get_type_hints(RLRConfig).items():
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        kinds[name] = {get_origin(kind) or kind for kind in members} - {type(None)}
    return {option.name: kinds[option.name] for option in dataclasses.fields(RLRConfig) if option.init}


def _default(option: Any) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _numbers(name: str, value: Any, kind: type) -> Any:
    """A number, or several in a string such as "2,5" (the command line's form of a list)."""
    if not isinstance(value, str):
        return value
    try:
        numbers = [kind(part) for part in value.strip("[]() ").split(",")]
    except ValueError:
        number = "whole number" if kind is int else "number"
        other = f"; or one of {', '.join(NAMED_STARTS)} (weights go into ho_start_weights)" if name == "ho_start" else ""
        raise ValueError(f"{name}={value!r}: must be a {number}, or {number}s separated by commas{other}") from None
    return numbers[0] if len(numbers) == 1 and name in ("fo_steps", "ho_length", "noise_steps") else numbers
