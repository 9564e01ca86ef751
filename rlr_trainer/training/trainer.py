"""`RLRTrainer`: rollout -> rewards -> advantages -> plan -> surrogates -> optimizer. Wiring only; the formulas are in estimators/."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from rlr_trainer.estimators.advantages import PerPromptStatistics
from rlr_trainer.estimators.chain import seeded_generator
from rlr_trainer.estimators.divergence import check_noise
from rlr_trainer.estimators.plan_draw import StartDistribution
from rlr_trainer.estimators.prediction import ControlVariateScale
from rlr_trainer.observing.callbacks import RolloutBar, RunFiles, WholeUpdates, call_rollout_end
from rlr_trainer.observing.monitor import RewardHackingMonitor
from rlr_trainer.observing.pictures import SampleLog
from rlr_trainer.pipelines import Policy, adapt, attach_lora, cast_frozen, load_pipeline
from rlr_trainer.pipelines.average import WeightAverage
from rlr_trainer.pipelines.reference import ReferencePolicy
from rlr_trainer.pipelines.sharding import check_sharding
from rlr_trainer.rewards.interface import RewardFunction, Rewards
from rlr_trainer.rollouts.batches import SHUFFLE, RolloutSummary, check_batches
from rlr_trainer.rollouts.collector import Collector
from rlr_trainer.rollouts.micro_batches import MicroBatches
from rlr_trainer.rollouts.processes import let_gloo_finish_at_exit
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts, open_dataset
from rlr_trainer.rollouts.scorer import check_rewards
from rlr_trainer.training.config import AUTO, RLRConfig
from rlr_trainer.training.evaluator import eval_source
from rlr_trainer.training.interruption import EXIT_TERMINATED, StopOnTermination
from rlr_trainer.training.meters import GradientMeter, summarize
from rlr_trainer.training.trl import compat
from rlr_trainer.training.trl import names as replaced
from rlr_trainer.training.updater import UpdatingTrainer, check_optimizer, lower_loss_scale

logger = logging.getLogger(__name__)


class RLRTrainer(UpdatingTrainer):
    """Fine-tunes a diffusion pipeline on a reward with the Recursive Likelihood Ratio optimizer (arXiv:2502.00639).

    The first five arguments are those of TRL's DDPOTrainer, in its order.

    Args:
        config: an `RLRConfig`, or TRL's `DDPOConfig` or `AlignPropConfig` (converted, see docs/migrating.md).
        reward_function: `(images, prompts, metadata) -> rewards` or `-> (rewards, reward_metadata)`, or a list of such
            functions (`config.reward_weights`). Images are float [B, 3, H, W] in [0, 1].
        prompt_function: `() -> (prompt, metadata)`. Give it or `train_dataset`.
        sd_pipeline: a diffusers pipeline, an object that wraps one as `.sd_pipeline`, a local folder, or a hub id.
        image_samples_hook: called after every rollout on the main process with `(batches, global_step, tracker)`, `batches` a
            list of `[images, prompts, metadata, rewards, reward_metadata]`; `tracker.log_images(dict, step=)` always works.
        train_dataset: rows with a "prompt" column, or the path or hub id of such a dataset; the other columns reach the reward as metadata.
        eval_dataset: the same, for `evaluate()`; sampled with fixed seeds.
        peft_config: a `peft.LoraConfig` in place of the one made of `config.lora_r`, `lora_alpha`, `lora_target_modules`.
        callbacks: `TrainerCallback`s; an `RLRCallback` also sees every rollout.
        optimizers: (optimizer, scheduler); by default AdamW of the config.
        eval_reward_function: a reward, or a list of them, for evaluation and logged pictures; by default the training's.

    Raises:
        ValueError, TypeError: before any long work, for input that cannot be; the message names field, rule and way out.
    """

    _tag_names = ["diffusers", "rlr", "reinforcement-learning", "text-to-image"]
    _name = "RLR"
    _paper = {
        "title": "Half-order Fine-Tuning for Diffusion Model: A Recursive Likelihood Ratio Optimizer",
        "id": "2502.00639",
    }

    @replaced.explains_arguments
    def __init__(
        self,
        config: RLRConfig,
        reward_function: RewardFunction | Sequence[RewardFunction],
        prompt_function: Callable[[], tuple[str, Any]] | None = None,
        sd_pipeline: Any = None,
        image_samples_hook: Callable[[Any, int, Any], Any] | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        eval_reward_function: RewardFunction | Sequence[RewardFunction] | None = None,
    ) -> None:
        replaced.check_overrides(type(self), RLRTrainer)
        image_samples_hook = compat.adapt_hook(config, image_samples_hook)
        if compat.trl_config_kind(config) is not None:
            given_config, config = config, RLRConfig.from_trl(config)
            given_config.output_dir = config.output_dir  # TRL's scripts end with trainer.save_model(config.output_dir)
        if not isinstance(config, RLRConfig):
            raise TypeError(f"config is a {type(config).__name__}: must be an RLRConfig, or TRL's DDPOConfig or AlignPropConfig")
        if (prompt_function is None) == (train_dataset is None):
            given = "both are" if prompt_function is not None else "neither is"
            raise ValueError(f"give exactly one of prompt_function and train_dataset: {given} given")
        if sd_pipeline is None:
            raise ValueError("sd_pipeline is None: pass a diffusers pipeline, a local folder, or a hub id")
        train_dataset, eval_dataset = open_dataset(train_dataset), open_dataset(eval_dataset, "eval_dataset")
        calling: dict[str, Any] = {
            "group_size": config.num_images_per_prompt,
            "batch_size": config.reward_batch_size,
            "timeout": config.reward_timeout,
            "on_error": config.on_reward_error,
        }
        asynchronous: dict[str, Any] = {"asynchronous": config.async_rewards, "workers": config.reward_workers}
        self.rewards = Rewards(reward_function, config.reward_weights, **calling, **asynchronous)
        own = eval_reward_function is None
        self.eval_rewards = (
            Rewards(reward_function, config.reward_weights, **calling)
            if eval_reward_function is None
            else Rewards(eval_reward_function, **calling)
        )
        self.eval_queries = 0
        self._apart_encoded, self._fixed_rows = OrderedDict(), None
        self.prompts: FunctionPrompts | DatasetPrompts = (
            FunctionPrompts(prompt_function)
            if prompt_function is not None
            else DatasetPrompts(train_dataset, config.seed + SHUFFLE, config.shuffle_prompts)
        )
        self.eval_prompts = eval_source(eval_dataset)
        self.image_samples_hook = image_samples_hook
        self.plan = config.plan
        check_rewards(self.rewards, config, self.plan, config.world_size, self.eval_prompts is not None and own)
        self.check_best_metric(config)
        pipeline = load_pipeline(sd_pipeline) if isinstance(sd_pipeline, str | Path) else sd_pipeline
        replaced.check_pipeline(pipeline)
        self._given = {"sd_pipeline": pipeline, "prompt_function": prompt_function, "reward_function": reward_function}
        self.adapter = adapt(pipeline)
        self.schedule = self.adapter.schedule(config.sample_num_steps, config.sample_eta)
        self.plan.check_noise(self.schedule.stds)
        self.latent_shape = self.adapter.latent_shape(config.height, config.width)
        config = compat.use_summed_density(config, math.prod(self.latent_shape))
        self.use_lora = config.use_lora and getattr(sd_pipeline, "use_lora", True)
        self.policy = self._make_policy(config, peft_config)
        self.run_files = RunFiles(self.run_facts)
        let_gloo_finish_at_exit()
        super().__init__(
            model=self.policy,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=_first,
            callbacks=[self.run_files, RewardHackingMonitor(), *(callbacks or [])],
            optimizers=optimizers,
        )
        check_sharding(config, self.plan, self.accelerator)
        check_batches(config, self.plan, self.accelerator.num_processes)
        check_optimizer(optimizers[0], self.policy.trainable_parameters())
        self._place_frozen_modules()
        if self.accelerator.device.type == "cpu":
            # Saturated rewards give denormal gradients, which slow a CPU's backward pass by 30 times and more.
            torch.set_flush_denormal(True)
        self._chosen: dict[str, int] = {}
        self._set_plan()
        self._start_loss_scale()
        uses_statistics = config.advantage_name == "per_prompt"
        self.statistics = (
            PerPromptStatistics(config.per_prompt_buffer_size, config.per_prompt_min_count) if uses_statistics else None
        )
        if config.num_log_images:  # before the trackers' callbacks, which close when training ends
            every, stopped = config.log_images_steps, lambda: self.termination.stopped
            log = SampleLog(self.fixed_samples, every, lambda: self.run_files.seconds, self.trackers, stopped)
            self.callback_handler.callbacks.insert(0, log)
        self.average = self._make_average()
        self.reference = self._make_reference()
        self.termination: StopOnTermination = StopOnTermination(self.accelerator)
        self.add_callback(self.termination)
        self.whole_updates = WholeUpdates()
        self.add_callback(self.whole_updates)
        self._meter = GradientMeter(self.policy.trainable_parameters())
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._queue = MicroBatches()
        self._zeroth_order_gradient: dict[str, Tensor] = {}
        self._valid_fraction = 1.0
        self._rollouts_done = 0

    # ---- construction ----

    def _make_policy(self, config: RLRConfig, peft_config: Any) -> Policy:
        denoiser = self.adapter.denoiser
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
            if attach_lora(denoiser, peft_config, config.seed):
                logger.warning("continuing the LoRA weights that the pipeline already has, with their own rank and targets")
        else:
            if peft_config is not None:
                raise ValueError(
                    "peft_config with use_lora=False (in the config, or in TRL's wrapper of the pipeline): one asks for LoRA weights, the other "
                    "for the whole network; leave one of them out"
                )
            denoiser.requires_grad_(True)
            denoiser.to(torch.float32)
        return Policy(denoiser, name_or_path=str(getattr(self.adapter.pipeline.config, "_name_or_path", "") or ""))

    def _make_average(self) -> WeightAverage | None:
        if self.args.ema_decay is None:
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"ema_decay={self.args.ema_decay} with FSDP or DeepSpeed: the average of sharded weights is not kept; leave ema_decay unset, or "
                "use plain data parallelism"
            )
        average = WeightAverage(self.policy.trainable_parameters(), self.args.ema_decay)
        self.callback_handler.callbacks.insert(0, average)  # before callbacks that may look at it
        return average

    def _make_reference(self) -> ReferencePolicy | None:
        if self.args.kl_coef is None:
            return None
        if self.plan.uses_zeroth_order:
            raise ValueError(
                f"kl_coef={self.args.kl_coef} with a zeroth-order plan (estimator={self.args.estimator!r}): perturbed steps have no divergence "
                "of their own; leave kl_coef unset, or set rest_estimator='lr'"
            )
        check_noise(self.schedule.stds, f"kl_coef={self.args.kl_coef}", "set sample_eta above 0, or leave kl_coef unset")
        device, checkpointing = self.accelerator.device, bool(self.args.gradient_checkpointing)
        return ReferencePolicy(self.policy, self.use_lora, device, self._frozen_dtype, self.accelerator.autocast, checkpointing)

    @property
    def _frozen_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32

    def _place_frozen_modules(self) -> None:
        """Frozen networks go to the device in the run's precision; the decoder stays in float32 under fp16, where it overflows."""
        device = self.accelerator.device
        dtype = self._frozen_dtype
        for module in self.adapter.frozen_modules:
            module.requires_grad_(False)
            cast_frozen(module, device, dtype)
        self.adapter.decoder.requires_grad_(False)
        cast_frozen(self.adapter.decoder, device, torch.float32 if dtype == torch.float16 else dtype)
        if self.use_lora:
            cast_frozen(self.adapter.denoiser, device, dtype)

    def _start_loss_scale(self) -> None:
        if self.plan.scored_steps():
            lower_loss_scale(self.accelerator.scaler, math.prod(self.latent_shape))

    def _set_plan(self, **chosen: int) -> None:
        """Takes up the configured plan, with the values that were chosen for "auto", and the state that goes with it."""
        self._chosen |= chosen
        self.plan = self.args.make_plan(**self._chosen)
        self.plan.check_noise(self.schedule.stds)
        self.starts = StartDistribution(self.plan.num_starts) if self.plan.ho_start == "grad_norm" else None
        self.control_scale = ControlVariateScale(self.plan.num_steps) if self.plan.uses_control_variate else None

    def _choose_plan(self) -> None:
        """Replaces "auto" in fo_steps and ho_length by what a measurement on this model and reward finds."""
        from rlr_trainer.diagnosis import auto_fo_steps, auto_ho_length

        if self.args.fo_steps == AUTO and "fo_steps" not in self._chosen:
            self._set_plan(fo_steps=auto_fo_steps(self))
            logger.warning("fo_steps='auto': chose K = %d of %d steps", self._chosen["fo_steps"], self.plan.num_steps)
        if self.args.ho_length == AUTO and "ho_length" not in self._chosen:
            if self.args.recompute == "recursive":
                logger.warning(
                    "ho_length='auto': with recompute='recursive' memory is that of one step for any h and does not bind"
                )
            budget, fo_steps = float(self.args.memory_budget_gb or 0), self.plan.fo_range[1]
            self._set_plan(ho_length=auto_ho_length(self, budget, fo_steps=fo_steps))
            logger.warning("ho_length='auto': chose h = %d", self._chosen["ho_length"])
        for reason in self.plan.biases():
            logger.warning("the gradient estimate is biased: %s", reason)

    # ---- Trainer's data: one placeholder per micro-batch; prompts are drawn by the rollout ----

    def get_train_dataloader(self) -> DataLoader:
        """One item per micro-batch of an epoch; see `RLRConfig` for what an epoch is."""
        rollouts = 1
        if isinstance(self.prompts, DatasetPrompts):
            samples = len(self.prompts) * self._collector(self.model).samples_per_prompt
            rollouts = -(-samples // (self.args.rollout_size * self.accelerator.num_processes))
        count = rollouts * self.args.updates_per_rollout * self.args.gradient_accumulation_steps
        return DataLoader(_MicroBatches(count), collate_fn=_first, generator=torch.Generator())

    # ---- training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | int | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        *,
        epochs: int | None = None,
    ) -> Any:
        """Trains, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last one in `output_dir`. A bare number is taken as
                `epochs`, as in `DDPOTrainer.train(epochs)`.
            epochs: number of epochs, in place of `config.num_train_epochs` and `max_steps`.

        Raises:
            ValueError: `output_dir` holds another run and neither resuming nor `config.overwrite` is asked for.
            CheckpointError: the checkpoint is incomplete, damaged, or does not fit; names the file.
            SystemExit: SIGTERM came; a checkpoint was saved (exit code 143).
        """
        if isinstance(resume_from_checkpoint, int) and not isinstance(resume_from_checkpoint, bool):
            resume_from_checkpoint, epochs = None, resume_from_checkpoint
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if epochs is not None:
            self.args.num_train_epochs, self.args.max_steps = epochs, -1
        if resume_from_checkpoint:
            folder = self._checkpoint_to_resume(resume_from_checkpoint)
            self._load_run_state(folder)
            if any(getattr(self.args, name) == AUTO and name not in self._chosen for name in ("fo_steps", "ho_length")):
                self._choose_plan()  # "auto" is new: the checkpoint's run had no need to choose
            resume_from_checkpoint = str(folder)
        else:
            self._resumed_at = 0
            self._chosen.clear()
            self._queue.clear()
            self._metrics.clear()
            self._meter.reset()
            self.check_output_folder()
            if self.args.check_reward:
                self._collector(self.model).probe()
            self._choose_plan()
        callbacks = self.callback_handler.callbacks
        callbacks.append(callbacks.pop(callbacks.index(self.whole_updates)))  # behind those added since
        with self.termination.taken():
            output = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
            if self.termination.stopped:
                logger.warning("stopped after update %d; continue with resume_from_checkpoint=True", self.state.global_step)
                raise SystemExit(EXIT_TERMINATED)
        if self.args.push_to_hub and (self.args.hub_strategy == HubStrategy.END or self._push_is_behind):
            self.push_to_hub()
        return output

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Accumulates the gradient of one micro-batch; samples a rollout first when the last one is used up."""
        model.eval()  # dropout would make the policy that is trained another one than that which sampled
        if not self._queue:
            self._start_rollout(model)
        later_updates = (self.args.updates_per_rollout - 1) * self.args.gradient_accumulation_steps
        self._on_policy = len(self._queue) > later_updates
        experience = self._queue.pop()
        if self.args.offload_rollouts:
            experience = experience.to(self.accelerator.device)
        started = time.perf_counter()
        chain = self._make_chain(model, experience.conditioning)
        result = self._sweep(model, chain, experience).run(experience.rollout, experience.draw, self._feedback(chain, experience))
        if self.accelerator.sync_gradients:
            self._finish_update(experience)
        self._metrics["time/backward"].append(time.perf_counter() - started)
        return self._record_sweep(experience, result)

    def _collector(self, model: nn.Module, on_step: Callable[[int], None] | None = None) -> Collector:
        return Collector(
            config=self.args,
            plan=self.plan,
            adapter=self.adapter,
            schedule=self.schedule,
            rewards=self.rewards,
            prompts=self.prompts,
            make_chain=lambda conditioning: self._make_chain(model, conditioning),
            accelerator=self.accelerator,
            statistics=self.statistics,
            starts=self.starts,
            on_step=on_step,
            reference=None if self.reference is None else self.reference.steps_of,
        )

    def _start_rollout(self, model: nn.Module) -> None:
        args = self.args
        quiet = args.disable_tqdm or not self.is_local_process_zero()
        with RolloutBar(args.sample_num_batches_per_epoch, self.plan.num_steps, quiet) as bar:
            collector = self._collector(model, on_step=bar.step)
            batches, summary = collector.collect(self._rollouts_done)
        self._valid_fraction = summary.valid_fraction
        for name, value in summary.metrics.items():
            self._metrics[name].append(value)
        if self.plan.uses_zeroth_order:
            self._zeroth_order_gradient = self._zeroth_order(batches, collector.zeroth_order_advantages(batches))
        diversity = self.rollout_diversity(summary)
        if not math.isnan(diversity):
            self._metrics["diversity"].append(diversity)
        self._run_hook(summary)
        self.control = call_rollout_end(self.callback_handler, args, self.state, self.control, rollout=summary, plan=self.plan)
        sizes = [len(batch) for batch in batches]
        rows = [rows for epoch in range(args.num_inner_epochs) for rows in self._micro_batch_rows(sum(sizes), epoch)]
        self._queue.fill(batches, rows, sizes)
        self._rollouts_done += 1

    def _micro_batch_rows(self, count: int, epoch: int) -> Sequence[Tensor]:
        """Sample numbers in batches of `per_device_train_batch_size`; later passes shuffle them."""
        order = torch.arange(count)
        if epoch:
            order = torch.randperm(count, generator=seeded_generator(self.args.seed, SHUFFLE, self._rollouts_done, epoch))
        return order.split(self.args.per_device_train_batch_size)

    def diagnose(self, **options: Any) -> Any:
        """Measures plans on this trainer's model and reward and proposes one; see `rlr_trainer.diagnosis.diagnose`."""
        from rlr_trainer.diagnosis import diagnose

        return diagnose(self, **options)

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what rollouts and updates took down since the last log line."""
        if "loss" in logs:
            logs |= summarize(self._metrics, self.accelerator)
            logs["reward_queries"] = self.rewards.queries * self.accelerator.num_processes
            self._metrics.clear()
        super().log(logs, start_time)

    def _run_hook(self, summary: RolloutSummary) -> None:
        if self.image_samples_hook is not None and self.is_world_process_zero():
            self.image_samples_hook(summary.pictures, self.state.global_step, self.trackers())


class _MicroBatches(Dataset):
    """Numbers that stand for micro-batches: Trainer counts them, the rollout makes them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"micro_batch": number}


def _first(items: list[Any]) -> Any:
    return items[0]
