"""`RLRTrainer`: rollout -> rewards -> advantages -> plan -> surrogates -> optimizer. Wiring only; the formulas are in estimators/."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from rlr_trainer import compat
from rlr_trainer.callbacks import HookTracker, MetricsFile, rollout_progress
from rlr_trainer.chain import seeded_generator
from rlr_trainer.config import AUTO, RLRConfig
from rlr_trainer.estimators.advantages import PerPromptStatistics
from rlr_trainer.estimators.prediction import ControlVariateScale, prediction_critic
from rlr_trainer.estimators.sweep import Feedback, Sweep, SweepResult
from rlr_trainer.estimators.zeroth_order import zeroth_order
from rlr_trainer.experience import SHUFFLE, Collector, Experience, RolloutSummary, check_batches
from rlr_trainer.meters import GradientMeter
from rlr_trainer.pipelines import PipelineChain, Policy, adapt, attach_lora, cast_frozen, load_pipeline
from rlr_trainer.plan import StartDistribution
from rlr_trainer.prompts import DatasetPrompts, FunctionPrompts
from rlr_trainer.rewards.interface import RewardFunction, Rewards
from rlr_trainer.sampling import SamplingTrainer

logger = logging.getLogger(__name__)


class RLRTrainer(SamplingTrainer):
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
        train_dataset: rows with a "prompt" column; the other columns reach the reward as metadata.
        eval_dataset: the same, for `evaluate()`; sampled with fixed seeds.
        peft_config: a `peft.LoraConfig` in place of the one made of `config.lora_r`, `lora_alpha`, `lora_target_modules`.
        callbacks: `TrainerCallback`s.
        optimizers: (optimizer, scheduler); by default AdamW of the config.

    Raises:
        ValueError, TypeError: before any long work, for input that cannot be; the message names field, rule and way out.
    """

    _tag_names = ["diffusers", "rlr", "reinforcement-learning", "text-to-image"]
    _name = "RLR"
    _paper = {
        "title": "Half-order Fine-Tuning for Diffusion Model: A Recursive Likelihood Ratio Optimizer",
        "id": "2502.00639",
    }

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
    ) -> None:
        if compat.trl_config_kind(config) is not None:
            config = RLRConfig.from_trl(config)
        if not isinstance(config, RLRConfig):
            raise TypeError(f"config is a {type(config).__name__}: must be an RLRConfig, or TRL's DDPOConfig or AlignPropConfig")
        if (prompt_function is None) == (train_dataset is None):
            given = "both are" if prompt_function is not None else "neither is"
            raise ValueError(f"give exactly one of prompt_function and train_dataset: {given} given")
        if sd_pipeline is None:
            raise ValueError("sd_pipeline is None: pass a diffusers pipeline, a local folder, or a hub id")
        self.rewards = Rewards(reward_function, config.reward_weights)
        self.prompts: FunctionPrompts | DatasetPrompts = (
            FunctionPrompts(prompt_function)
            if prompt_function is not None
            else DatasetPrompts(train_dataset, config.seed + SHUFFLE, config.shuffle_prompts)
        )
        self.eval_prompts = None if eval_dataset is None else DatasetPrompts(eval_dataset, 0, False, "eval_dataset")
        self.image_samples_hook = image_samples_hook
        self.plan = config.plan
        pipeline = load_pipeline(sd_pipeline) if isinstance(sd_pipeline, str | Path) else sd_pipeline
        self.adapter = adapt(pipeline)
        self.schedule = self.adapter.schedule(config.sample_num_steps, config.sample_eta)
        self.plan.check_noise(self.schedule.stds)
        self.latent_shape = self.adapter.latent_shape(config.height, config.width)
        self.use_lora = config.use_lora and getattr(sd_pipeline, "use_lora", True)
        self.policy = self._make_policy(config, peft_config)
        super().__init__(
            model=self.policy,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=_first,
            callbacks=[MetricsFile(), *(callbacks or [])],
            optimizers=optimizers,
        )
        check_batches(config, self.plan, self.accelerator.num_processes)
        self._place_frozen_modules()
        if self.accelerator.device.type == "cpu":
            # Saturated rewards give denormal gradients, which slow a CPU's backward pass by 30 times and more.
            torch.set_flush_denormal(True)
        self._chosen: dict[str, int] = {}
        self._set_plan()
        uses_statistics = config.advantage_name == "per_prompt"
        self.statistics = (
            PerPromptStatistics(config.per_prompt_buffer_size, config.per_prompt_min_count) if uses_statistics else None
        )
        self._meter = GradientMeter(self.policy.trainable_parameters())
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._queue: deque[Experience] = deque()
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
            denoiser.requires_grad_(True)
            denoiser.to(torch.float32)
        return Policy(denoiser, name_or_path=str(getattr(self.adapter.pipeline.config, "_name_or_path", "") or ""))

    def _place_frozen_modules(self) -> None:
        """Frozen networks go to the device in the run's precision; the decoder stays in float32 under fp16, where it overflows."""
        device = self.accelerator.device
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        for module in self.adapter.frozen_modules:
            module.requires_grad_(False)
            cast_frozen(module, device, dtype)
        self.adapter.decoder.requires_grad_(False)
        cast_frozen(self.adapter.decoder, device, torch.float32 if dtype == torch.float16 else dtype)
        if self.use_lora:
            cast_frozen(self.adapter.denoiser, device, dtype)

    def _set_plan(self, **chosen: int) -> None:
        """Takes up the configured plan, with the values that were chosen for "auto", and the state that goes with it."""
        self._chosen |= chosen
        self.plan = self.args.make_plan(**self._chosen)
        self.plan.check_noise(self.schedule.stds)
        self.starts = StartDistribution(self.plan.num_starts) if self.plan.ho_start == "grad_norm" else None
        self.control_scale = ControlVariateScale(self.plan.num_steps) if self.plan.uses_control_variate else None

    def _choose_plan(self) -> None:
        """Replaces "auto" in fo_steps and ho_length by what a measurement on this model and reward finds."""
        from rlr_trainer.diagnostics import auto_fo_steps, auto_ho_length

        if self.args.fo_steps == AUTO:
            self._set_plan(fo_steps=auto_fo_steps(self))
            logger.warning("fo_steps='auto': chose K = %d of %d steps", self._chosen["fo_steps"], self.plan.num_steps)
        if self.args.ho_length == AUTO:
            if self.args.recompute == "recursive":
                logger.warning(
                    "ho_length='auto': with recompute='recursive' memory is that of one step for any h and does not bind"
                )
            self._set_plan(ho_length=auto_ho_length(self, float(self.args.memory_budget_gb or 0)))
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
        """
        if isinstance(resume_from_checkpoint, int) and not isinstance(resume_from_checkpoint, bool):
            resume_from_checkpoint, epochs = None, resume_from_checkpoint
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if epochs is not None:
            self.args.num_train_epochs, self.args.max_steps = epochs, -1
        if not resume_from_checkpoint:
            self.check_output_folder()
            if self.args.check_reward:
                self._collector(self.model).probe()
            self._choose_plan()
        self._queue.clear()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Accumulates the gradient of one micro-batch; samples a rollout first when the last one is used up."""
        model.eval()  # dropout would make the policy that is trained another one than that which sampled
        if not self._queue:
            self._start_rollout(model)
        experience = self._queue.popleft()
        started = time.perf_counter()
        chain = self._make_chain(model, experience.conditioning)
        result = self._sweep(model, chain, experience).run(experience.rollout, experience.draw, self._feedback(experience))
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
        )

    def _start_rollout(self, model: nn.Module) -> None:
        args = self.args
        total = args.sample_num_batches_per_epoch * self.plan.num_steps
        with rollout_progress(total, "sampling", disable=args.disable_tqdm or not self.is_local_process_zero()) as bar:
            collector = self._collector(model, on_step=lambda step: bar.update(1))
            batches, summary = collector.collect(self._rollouts_done)
        self._valid_fraction = summary.valid_fraction
        for name, value in summary.metrics.items():
            self._metrics[name].append(value)
        if self.plan.uses_zeroth_order:
            self._zeroth_order_gradient = self._zeroth_order(batches, collector.zeroth_order_advantages(batches))
        self._run_hook(summary)
        for epoch in range(args.num_inner_epochs):
            self._queue.extend(self._micro_batches(batches, epoch))
        self._rollouts_done += 1

    def _micro_batches(self, batches: list[Experience], epoch: int) -> list[Experience]:
        """The rollout in batches of `per_device_train_batch_size`; later passes shuffle it."""
        size = self.args.per_device_train_batch_size
        if epoch == 0 and size == self.args.sample_batch_size:
            return batches
        whole = Experience.concatenate(batches)
        order = torch.arange(len(whole))
        if epoch:
            order = torch.randperm(len(whole), generator=seeded_generator(self.args.seed, SHUFFLE, self._rollouts_done, epoch))
        return [whole.select(rows) for rows in order.split(size)]

    def _share(self) -> float:
        """Weight of one sample in an update: 1 / samples with a reward. DDP averages over processes, Trainer sums micro-batches."""
        per_process = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return 1.0 / (per_process * self._valid_fraction)

    def _feedback(self, experience: Experience) -> Feedback:
        assert experience.advantage is not None and experience.scale is not None
        share = self._share()
        scale = experience.scale * share
        gradient = experience.reward_gradient
        if gradient is not None:
            gradient = self.plan.fo_weight * gradient * scale.reshape(-1, *[1] * (gradient.dim() - 1))
        paired = self.plan.uses_zeroth_order and self.plan.zo_antithetic
        blocks = experience.index // 2 if paired else None
        return Feedback(advantage=experience.advantage * share, reward_gradient=gradient, scale=scale, blocks=blocks)

    def _sweep(self, model: nn.Module, chain: PipelineChain, experience: Experience) -> Sweep:
        params = chain.parameters()
        synchronizes = self.accelerator.sync_gradients
        is_first_order = experience.draw.first_order

        @contextlib.contextmanager
        def scope(steps: list[int], is_last: bool) -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                if not (is_last and synchronizes):
                    stack.enter_context(self.accelerator.no_sync(model))
                if self.args.log_estimator_norms:
                    part = "fo" if bool(is_first_order[:, steps[-1]].any()) else "ho"
                    stack.enter_context(self._meter.measuring(steps[0], part, self._backward_factor()))
                yield

        def reward(latents: Tensor) -> Tensor:
            images = self.adapter.decode(latents)
            return self.rewards(images, experience.prompts, experience.metadata, differentiable=True).total.nan_to_num()

        return Sweep(
            chain,
            params,
            backward=self._backward,
            scope=scope,
            recompute=self.args.recompute,
            critic=prediction_critic(chain, params, reward) if self.plan.uses_prediction else None,
            control_scale=self.control_scale,
            clip_range=self.args.clip_range,
            mean_density=True,
        )

    def _backward(self, surrogate: Tensor) -> float:
        """Surrogates ascend the reward and optimizers descend: the sign is turned here, once."""
        self.accelerator.backward(-surrogate)
        return self._backward_factor()

    def _backward_factor(self) -> float:
        """What `_backward` multiplies gradients by: the sign, and the loss scale of fp16."""
        scaler = self.accelerator.scaler
        return -(scaler.get_scale() if scaler is not None else 1.0)

    def _zeroth_order(self, batches: Sequence[Experience], advantages: Sequence[Tensor]) -> dict[str, Tensor]:
        """Zeroth-order part of the update's gradient, over all processes."""
        params = self.policy.trainable_parameters()
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        share = self._share() * self.plan.rest_weight
        for batch, advantage in zip(batches, advantages, strict=True):
            assert batch.perturbations is not None
            for name, term in zeroth_order(advantage * share, batch.draw.zeroth, batch.perturbations, params).items():
                total[name] += term
        return {name: self.accelerator.reduce(term, reduction="mean") for name, term in total.items()}

    def _finish_update(self, experience: Experience) -> None:
        """After the last micro-batch of an update: adds the zeroth-order part, and takes down the norms of the parts."""
        params = self.policy.trainable_parameters()
        factor = self._backward_factor()
        for name, term in self._zeroth_order_gradient.items():
            gradient = params[name].grad
            params[name].grad = factor * term if gradient is None else gradient.add_(term, alpha=factor)
        norms = self._meter.part_norms()
        if self._zeroth_order_gradient:
            norms["zo"] = sum(float(term.square().sum()) for term in self._zeroth_order_gradient.values()) ** 0.5
            self._zeroth_order_gradient = {}
        for part, norm in norms.items():
            self._metrics[f"estimator/{part}_grad_norm"].append(norm)
        start = int(experience.draw.start[0])
        if start >= 0:
            self._metrics["estimator/subchain_start"].append(float(start))
        if self.starts is not None:
            norm = sum(n**2 for s, n in self._meter.step_norms().items() if start <= s < start + self.plan.ho_length) ** 0.5
            self.starts.update(start, norm)
        self._meter.reset()

    def _record_sweep(self, experience: Experience, result: SweepResult) -> Tensor:
        """Takes down ratios, fits the control variate, and returns the loss: minus the surrogate objective."""
        assert experience.advantage is not None
        if self.control_scale is not None:
            for step, values in result.critic_values.items():
                self.control_scale.update(step, experience.rewards, values)
        objective = torch.zeros((), device=self.accelerator.device)
        rewards = experience.rewards[~torch.isnan(experience.rewards)]
        if self.plan.fo_range[1] > 0 and len(rewards):
            objective += rewards.mean().to(objective)
        if result.log_ratios:
            ratio = torch.stack(list(result.log_ratios.values())).exp()  # [scored steps, B]
            deviation = (ratio - 1).abs()
            self._metrics["ratio/mean"].append(float(ratio.mean()))
            self._metrics["ratio/max_abs_dev"].append(float(deviation.max()))
            clip_range = self.args.clip_range
            self._metrics["clip_ratio"].append(float((deviation > clip_range).float().mean()) if clip_range else 0.0)
            objective += (experience.advantage * ratio).mean()
        return -objective / self.args.gradient_accumulation_steps

    def diagnose(self, **options: Any) -> Any:
        """Measures plans on this trainer's model and reward and proposes one; see `rlr_trainer.diagnostics.diagnose`."""
        from rlr_trainer.diagnostics import diagnose

        return diagnose(self, **options)

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means, since the last log line, of what rollouts and updates took down."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._metrics.items()}
            logs["reward_queries"] = self.rewards.queries * self.accelerator.num_processes
            self._metrics.clear()
        super().log(logs, start_time)

    def _run_hook(self, summary: RolloutSummary) -> None:
        if self.image_samples_hook is not None and self.is_world_process_zero():
            tracker = HookTracker(self.callback_handler.callbacks, Path(self.args.output_dir))
            self.image_samples_hook(summary.pictures, self.state.global_step, tracker)


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
