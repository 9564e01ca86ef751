"""What a trainer is made of, built in one place."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rlr_trainer.estimators.advantages import PerPromptStatistics
from rlr_trainer.estimators.divergence import check_noise
from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.estimators.plan_state import PlanState
from rlr_trainer.estimators.prediction import FP16_LOSS_SCALE
from rlr_trainer.observing.callbacks import BetweenRollouts
from rlr_trainer.observing.pictures import FixedSamples, SampleLog
from rlr_trainer.observing.run_files import RunFiles
from rlr_trainer.persistence.descriptions import in_words
from rlr_trainer.persistence.output_folder import check_writable
from rlr_trainer.persistence.provenance import describe_function, describe_prompts
from rlr_trainer.persistence.run_state import Part, RunState, Stateful, compared_settings
from rlr_trainer.persistence.weights import Weights
from rlr_trainer.pipelines import Policy, adapt, cast_frozen, load_pipeline
from rlr_trainer.pipelines.average import WeightAverage
from rlr_trainer.pipelines.old_policy import OldPolicy
from rlr_trainer.pipelines.reference import ReferencePolicy
from rlr_trainer.rewards.interface import RewardFunction, Rewards
from rlr_trainer.rollouts.advantage_rule import AdvantageRule
from rlr_trainer.rollouts.batches import SHUFFLE
from rlr_trainer.rollouts.collector import Collector, RolloutOptions
from rlr_trainer.rollouts.micro_batches import MicroBatches
from rlr_trainer.rollouts.processes import Processes
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts
from rlr_trainer.rollouts.sampler import Sampler
from rlr_trainer.rollouts.scorer import Scorer
from rlr_trainer.schedules import NoiseWindows
from rlr_trainer.training.checks import (
    check_batches,
    check_best_metric,
    check_conditions,
    check_device,
    check_launch,
    check_optimizer,
    check_rewards,
    is_sharded,
)
from rlr_trainer.training.config import AUTO, RLRConfig
from rlr_trainer.training.evaluator import Evaluator, FixedPictures, eval_source
from rlr_trainer.training.interruption import StopOnTermination
from rlr_trainer.training.keeping import graph_keeping
from rlr_trainer.training.meters import MetricsLog
from rlr_trainer.training.saving import default_steps
from rlr_trainer.training.trl import configs, names
from rlr_trainer.training.updater import UpdateOptions, Updater

logger = logging.getLogger(__name__)

# After a plan or a bias that names steps, where the noise is in another window for every rollout.
FIRST_WINDOW = " (steps as of the first noise window)"


class Parts:
    """The objects that `RLRTrainer` wires together. Those that know no process are built at once, the others by `connect`.

    Args:
        config, reward_function, prompt_function, sd_pipeline, train_dataset, eval_dataset, peft_config, eval_reward_function:
            the trainer's.

    Raises:
        ValueError, TypeError: input that cannot be; names field, rule and way out.
    """

    def __init__(
        self,
        config: RLRConfig,
        reward_function: RewardFunction | Sequence[RewardFunction],
        prompt_function: Callable[[], tuple[str, Any]] | None,
        sd_pipeline: Any,
        train_dataset: Any,
        eval_dataset: Any,
        peft_config: Any,
        eval_reward_function: RewardFunction | Sequence[RewardFunction] | None,
    ) -> None:
        if sd_pipeline is None:
            raise ValueError(
                "sd_pipeline is None: pass a diffusers pipeline, a local folder, or a hub id, by name or as the fourth argument"
            )
        check_device(config)
        if config.should_save:  # Trainer makes the folder
            check_writable(Path(config.output_dir))
        same = eval_reward_function is None
        self.rewards = _rewards(config, reward_function, config.reward_weights, config.async_rewards)
        self.eval_rewards = (
            _rewards(config, reward_function, config.reward_weights) if same else _rewards(config, eval_reward_function)
        )
        self.prompts = _prompts(config, prompt_function, train_dataset)
        self.eval_prompts = eval_source(eval_dataset)
        self.arguments: dict[str, Any] | None = None  # of the command line, for the record
        # described before they are used: a function may count its calls
        self.described = [describe_function(function) for function in self.rewards.functions]
        self.described_prompts = describe_prompts(self.prompts)
        self.chosen: dict[str, int] = {}  # in place of "auto"
        self.reasons: dict[str, str] = {}  # why
        self.reward_notes: list[str] = []  # what was seen when the reward was tried
        check_rewards(self.rewards, config, config.plan, config.world_size, same and self.eval_prompts is not None)
        pipeline = load_pipeline(sd_pipeline) if isinstance(sd_pipeline, str | Path) else sd_pipeline
        names.check_pipeline(pipeline)
        self.sd_pipeline, self.prompt_fn, self.reward_fn = pipeline, prompt_function, reward_function  # DDPOTrainer's names
        self.adapter = adapt(pipeline)
        check_conditions(self.adapter.conditions, self.prompts, self.eval_prompts)
        self.layout = self.adapter.layout(config.height, config.width, config.num_frames)
        self.schedule = self.adapter.schedule(self.layout, config.sampler_options)
        self.windows = self._make_windows(config)
        self.plan_state = PlanState(self._on_noise(config, config.plan))
        self.config = configs.use_summed_density(config, math.prod(self.layout.shape))
        if config.sample_guidance_rescale and not self.adapter.rescales_guidance:
            raise ValueError(
                f"sample_guidance_rescale={config.sample_guidance_rescale}: {type(self.adapter.pipeline).__name__} has no such argument; leave "
                "it at 0"
            )
        if config.decode_in_chunks and self.adapter.undivided is not None:
            raise ValueError(f"decode_in_chunks=True: {type(self.adapter.pipeline).__name__}: {self.adapter.undivided}")
        self.use_lora = config.use_lora and getattr(sd_pipeline, "use_lora", True)
        self.policy = self._make_policy(peft_config)
        self.statistics = None
        if config.advantage_name == "per_prompt":
            self.statistics = PerPromptStatistics(config.per_prompt_buffer_size, config.per_prompt_min_count)
        self.metrics, self.queue, self.between_rollouts = MetricsLog(), MicroBatches(), BetweenRollouts()
        self.rollouts_done = 0

    @property
    def plan(self) -> EstimatorPlan:
        """The plan in force."""
        return self.plan_state.plan

    def connect(self, accelerator: Any, optimizer: Any, own_evaluation: bool) -> None:
        """Builds the parts that know the processes and the device.

        `optimizer` is the one given to the trainer, or None; with `own_evaluation` its class has an `evaluate`, and metrics, of its own.
        """
        config = self.config
        check_launch(config, self.plan, self.adapter.shardable, accelerator)
        check_batches(config, self.plan, accelerator.num_processes)
        check_optimizer(optimizer, self.policy.trainable_parameters())
        self.has_own_optimizer = optimizer is not None
        self.processes = Processes(accelerator)
        self._place_frozen_modules(accelerator.device)
        self.average = self._make_average(accelerator)
        self.weights = Weights(self.adapter, self.use_lora, self.average)
        self.reference, self.old_policy = self._make_reference(accelerator), self._make_old_policy(accelerator)
        self.sampler = Sampler(
            self.adapter, self.policy, self.schedule, self.layout, config.sample_guidance_scale, accelerator.device,
            config.negative_prompt, tuple(config.prompt_scales or ()), config.sample_guidance_rescale,
        )  # fmt: skip
        self.scorer = Scorer(self.adapter, self.layout, self.rewards)
        shared = self.sampler, self.scorer, self.plan_state
        keeping = graph_keeping(config, self.plan, accelerator, lambda: [*self.policy.parameters(), *self.policy.buffers()])
        options, rule, policies = self._rollout_options(), self.advantage_rule(), (self.reference, self.old_policy)
        self.collector = Collector(
            *shared, self.prompts, self.processes, options, rule, *policies, self.windows, keeping, bool(config.kl_coef)
        )
        self.updater = Updater(*shared, self.processes, self._update_options(accelerator), *policies)
        eval_scorer = Scorer(self.adapter, self.layout, self.eval_rewards)
        self.evaluator = Evaluator(
            self.sampler.apart(), eval_scorer, self.processes, config.sample_batch_size, self.weights.averaged
        )
        source: Any = next(iter(self.eval_prompts.values())) if isinstance(self.eval_prompts, dict) else self.eval_prompts
        self.pictures = FixedPictures(
            self.evaluator, self.prompts if source is None else source, config.num_log_images, self.collector.prompts_per_rollout
        )
        if not own_evaluation:
            check_best_metric(config, self.evaluator, self.eval_prompts)
        self.run_files = RunFiles(self.facts)
        self.termination = StopOnTermination(accelerator, lambda: bool(self.queue))
        self.run_state = RunState(self._stateful(), lambda: compared_settings(config, self._trained_on()))

    def observers(self, fixed_samples: Callable[[], FixedSamples], trackers: Callable[[], Any]) -> list[TrainerCallback]:
        """What watches every run, in the order in which it must be told. `fixed_samples` makes the pictures that `trackers` get."""
        config, files, termination = self.config, self.run_files, self.termination
        log = SampleLog(
            fixed_samples,
            lambda updates: config.log_images_steps or default_steps(updates),
            lambda: files.seconds,
            trackers,
            lambda: termination.stopped,
        )
        followers = [follower for follower in (self.average, self.old_policy) if follower is not None]
        return [*followers, *([log] if config.num_log_images else []), files, termination]

    def choose(self, **chosen: int) -> None:
        """Takes up the configured plan, with values that were chosen for "auto"."""
        self.chosen |= chosen
        if self.config.noise_steps == AUTO:
            self.schedule = self.adapter.schedule(self.layout, self.config.make_sampler_options(**self.chosen))
            for sampler in (self.sampler, self.evaluator.sampler):
                sampler.schedule = self.schedule
        self.plan_state.take(self._on_noise(self.config, self.config.make_plan(**self.chosen)))

    def unchosen(self) -> list[str]:
        """The options that are "auto" and for which nothing is chosen yet."""
        options = ("noise_steps", "fo_steps", "ho_length")
        return [name for name in options if getattr(self.config, name) == AUTO and name not in self.chosen]

    def begin_anew(self) -> None:
        """Forgets what a training before has chosen or left half done."""
        if self.chosen:
            self.chosen.clear()
            self.reasons.clear()
            self.choose()
        if self.old_policy is not None:
            self.old_policy.forget()
        self.queue.fill([], [])
        self.metrics.values.clear()
        self.updater.reset()

    def advantage_rule(self) -> AdvantageRule:
        """How rewards become advantages."""
        config = self.config
        return AdvantageRule(
            name=config.advantage_name,
            limit=config.advantage_limit,
            group_size=config.num_images_per_prompt,
            statistics=self.statistics,
            separately=config.normalizes_each_reward,
            names=self.rewards.names,
            weights=self.rewards.weights,
        )

    def facts(self) -> dict[str, Any]:
        """What `run.json` says of the run."""
        from rlr_trainer import __version__

        device = self.processes.device
        name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
        libraries = ("torch", "transformers", "diffusers", "trl", "peft", "accelerate")
        return {
            "model": self.policy.config.name_or_path or type(self.adapter.pipeline).__name__,
            "arguments": self.arguments,
            "rewards": self.rewards.names,
            "reward_functions": self.described,
            "eval_rewards": self.eval_rewards.names,
            "prompts": self.described_prompts,
            "reward_notes": self.reward_notes,
            "plan": str(self.plan) + ("" if self.windows is None else FIRST_WINDOW),
            "chosen": {name: {"value": value, "reason": self.reasons.get(name)} for name, value in self.chosen.items()},
            "options": self.config.rlr_options(),
            "changed": self.config.changed_options(),
            "versions": {"rlr_trainer": __version__} | {name: importlib.metadata.version(name) for name in libraries},
            "device": name,
            "processes": self.processes.count,
            "trainable_parameters": sum(p.numel() for p in self.policy.trainable_parameters().values()),
        }

    def _make_windows(self, config: RLRConfig) -> NoiseWindows | None:
        if config.noise_window == "fixed":
            return None
        options = (dataclasses.replace(config.sampler_options, noise_steps=window) for window in config.noise_windows)
        schedules = tuple(self.adapter.schedule(self.layout, one) for one in options)
        return NoiseWindows(config.noise_window, schedules, config.noise_window_rollouts)

    def _on_noise(self, config: RLRConfig, plan: EstimatorPlan) -> EstimatorPlan:
        """The plan on the sampler's noise; PlanError if it does not fit that of every window."""
        for window, schedule in zip(config.noise_windows, self.windows.schedules if self.windows is not None else (), strict=False):
            try:
                plan.on_noise(schedule.stds)
            except PlanError as error:
                raise PlanError(
                    f"noise_window={config.noise_window!r}, noise in steps {window[0]} to {window[1]}: {error}"
                ) from None
        return plan.on_noise(self.schedule.stds)

    def _make_policy(self, peft_config: Any) -> Policy:
        config = self.config
        if self.use_lora:
            if peft_config is None:
                from peft import LoraConfig

                peft_config = LoraConfig(
                    r=config.lora_r,
                    lora_alpha=config.lora_alpha or config.lora_r,
                    target_modules=list(config.lora_target_modules or self.adapter.lora_targets),
                    init_lora_weights="gaussian",
                )
            if getattr(peft_config, "lora_dropout", 0):
                raise ValueError(
                    f"peft_config.lora_dropout={peft_config.lora_dropout}: must be 0, because a likelihood ratio compares the policy "
                    "that sampled with the same policy, not with another random mask"
                )
            if self.adapter.attach_lora(peft_config, config.seed):
                logger.warning("continuing the LoRA weights that the pipeline already has, with their own rank and targets")
        else:
            if peft_config is not None:
                raise ValueError(
                    "peft_config with use_lora=False (in the config, or in TRL's wrapper of the pipeline): one asks for LoRA weights, the other "
                    "for the whole network; leave one of them out"
                )
            self.adapter.train_whole()
        return Policy(self.adapter.denoiser, name_or_path=str(getattr(self.adapter.pipeline.config, "_name_or_path", "") or ""))

    @property
    def _frozen_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.bf16 else torch.float16 if self.config.fp16 else torch.float32

    def _place_frozen_modules(self, device: torch.device) -> None:
        """Frozen networks go to the device in the run's precision; the decoder stays in float32 under fp16, where it overflows."""
        dtype = self._frozen_dtype
        waits = self.config.offload_text_encoders
        self.adapter.encoder_device = device if waits else None
        for module in self.adapter.frozen_modules:
            module.requires_grad_(False)
            cast_frozen(module, torch.device("cpu") if waits else device, dtype)
        self.adapter.decodes_in_chunks = self.config.decode_in_chunks
        self.adapter.decoder.requires_grad_(False)
        cast_frozen(self.adapter.decoder, device, torch.float32 if dtype == torch.float16 else dtype)
        if self.use_lora:
            cast_frozen(self.adapter.denoiser, device, dtype)

    def _make_average(self, accelerator: Any) -> WeightAverage | None:
        decay = self.config.ema_decay
        if decay is None:
            return None
        if is_sharded(accelerator):
            raise ValueError(
                f"ema_decay={decay} with FSDP or DeepSpeed: the average of sharded weights is not kept; leave ema_decay unset, or use plain "
                "data parallelism"
            )
        return WeightAverage(self.policy.trainable_parameters(), decay)

    def _make_reference(self, accelerator: Any) -> ReferencePolicy | None:
        config = self.config
        if config.kl_coef is None:
            return None
        if self.plan.uses_zeroth_order:
            raise ValueError(
                f"kl_coef={config.kl_coef} with a zeroth-order plan (estimator={config.estimator!r}): perturbed steps have no divergence of "
                "their own; leave kl_coef unset, or set rest_estimator='lr'"
            )
        if self.plan.silent_estimator is None:
            way_out = "set sample_eta above 0, leave kl_coef unset, or leave such steps out (silent_estimator='none')"
            check_noise(self.schedule.stds, f"kl_coef={config.kl_coef}", way_out)
        device, checkpointing = accelerator.device, bool(config.gradient_checkpointing)
        return ReferencePolicy(self.policy, self.use_lora, device, self._frozen_dtype, accelerator.autocast, checkpointing)

    def _make_old_policy(self, accelerator: Any) -> OldPolicy | None:
        """The policy that samples, where a loss on the forward process asks for it and it is not always the present one."""
        forward = self.plan.forward
        if forward is None or not (forward.averages or self.config.updates_per_rollout > 1):
            return None
        if is_sharded(accelerator):
            raise ValueError(
                f"estimator={self.config.estimator!r} with FSDP or DeepSpeed: the old policy's sharded weights are not kept; use plain data "
                "parallelism, or estimator='awm' with one update per rollout"
            )
        return OldPolicy(self.policy, forward.decay, lambda: bool(self.queue))

    def _rollout_options(self) -> RolloutOptions:
        config = self.config
        return RolloutOptions(
            seed=config.seed,
            batch_size=config.sample_batch_size,
            num_batches=config.sample_num_batches_per_epoch,
            group_size=config.num_images_per_prompt,
            offload=config.offload_rollouts,
            prediction_size=config.per_device_train_batch_size,
            prediction_loss_scale=FP16_LOSS_SCALE if config.fp16 else 1.0,
        )

    def _update_options(self, accelerator: Any) -> UpdateOptions:
        config = self.config
        sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None
        if sharded and config.log_estimator_norms:
            logger.warning("log_estimator_norms: the gradient norms of the parts are not measured with FSDP, and not logged")
        return UpdateOptions(
            samples=config.per_device_train_batch_size * config.gradient_accumulation_steps,
            clip_range=config.clip_range,
            advantage_limit=config.advantage_limit,
            kl_coef=config.kl_coef,
            recompute="graph" if config.recompute == "graph" else "recursive",  # kept graphs come with their batch
            half_precision=config.fp16,
            measure_parts=config.log_estimator_norms and not sharded,
            measure_steps=config.log_step_norms,
        )

    def _stateful(self) -> dict[str, Stateful]:
        """The parts of a checkpoint, in the order in which they are taken up."""
        parts: dict[str, Stateful | None] = {
            "progress": Part(self._progress, self._take_progress),
            "prompts": self.prompts,
            "plan": self.plan_state,
            "metrics": self.metrics,
            "pictures": self.pictures,
            "statistics": self.statistics,
            "average": self.average,
            "old_policy": self.old_policy,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _trained_on(self) -> dict[str, Any]:
        """The arguments that a resumed run is compared with, in words."""
        rewards, prompts = list(map(in_words, self.described)), in_words(self.described_prompts)
        if self.arguments is not None:  # shorter names for the same, but for code that may change
            codes = (f", code {one['code']}" if "code" in one else "" for one in self.described)
            rewards = [f"{name}{code}" for name, code in zip(self.arguments["reward"], codes, strict=True)]
        return {"reward_function": "; ".join(rewards), "prompts": prompts}

    def _progress(self) -> dict[str, Any]:
        return {
            "rollouts_done": self.rollouts_done,
            "chosen": dict(self.chosen),
            "reasons": dict(self.reasons),
            "reward_queries": self.rewards.queries * self.processes.count,
            "eval_reward_queries": self.evaluator.queries,
        }

    def _take_progress(self, state: dict[str, Any]) -> None:
        self.rollouts_done, self.evaluator.queries = state["rollouts_done"], state["eval_reward_queries"]
        self.rewards.queries = state["reward_queries"] // self.processes.count
        # the run goes on with what was chosen at its start
        self.reasons = state.get("reasons", {})
        self.choose(**{name: value for name, value in state["chosen"].items() if getattr(self.config, name) == AUTO})
        self.queue.fill([], [])


def own_config(given: Any) -> RLRConfig:
    """A config of the trainer's own, which it may change: a copy, or what TRL's `DDPOConfig` or `AlignPropConfig` says.

    Raises:
        TypeError: it is another kind of object.
    """
    if configs.trl_config_kind(given) is not None:
        return RLRConfig.from_trl(given)
    if not isinstance(given, RLRConfig):
        raise TypeError(f"config is a {type(given).__name__}: must be an RLRConfig, or TRL's DDPOConfig or AlignPropConfig")
    return copy.copy(given)


def _rewards(config: RLRConfig, function: Any, weights: Sequence[float] | None = None, asynchronous: bool = False) -> Rewards:
    return Rewards(
        function,
        weights,
        group_size=config.num_images_per_prompt,
        batch_size=config.reward_batch_size,
        timeout=config.reward_timeout,
        on_error=config.on_reward_error,
        asynchronous=asynchronous,
        workers=config.reward_workers if asynchronous else 1,
    )


def _prompts(config: RLRConfig, function: Any, dataset: Any) -> FunctionPrompts | DatasetPrompts:
    if (function is None) == (dataset is None):
        given = "both are" if function is not None else "neither is"
        raise ValueError(f"give exactly one of prompt_function and train_dataset: {given} given")
    if function is not None:
        return FunctionPrompts(function)
    return DatasetPrompts(dataset, config.seed + SHUFFLE, config.shuffle_prompts)
