"""`RLRTrainer`: forwards the hooks of `transformers.Trainer` to the parts that `parts.py` builds. The formulas are in estimators/."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from rlr_trainer.observing.callbacks import RolloutCallbackHandler
from rlr_trainer.observing.monitor import DeadSignalMonitor, RewardHackingMonitor
from rlr_trainer.observing.pictures import FixedSamples
from rlr_trainer.observing.progress import bars_closed, in_own_form
from rlr_trainer.persistence.hub import HubUploads
from rlr_trainer.persistence.model_card import write_model_card
from rlr_trainer.persistence.run_state import follow_schedule, load_generators_of_main_process
from rlr_trainer.rewards.interface import RewardFunction
from rlr_trainer.rollouts.processes import let_gloo_finish_at_exit
from rlr_trainer.rollouts.prompts import open_dataset
from rlr_trainer.training import running
from rlr_trainer.training.config import RLRConfig
from rlr_trainer.training.parts import Parts, own_config
from rlr_trainer.training.trl import configs, names
from rlr_trainer.training.trl.base import TRLBaseTrainer


class RLRTrainer(TRLBaseTrainer):
    """Fine-tunes a diffusion pipeline on a reward with the Recursive Likelihood Ratio optimizer (arXiv:2502.00639).

    The first five arguments are those of TRL's DDPOTrainer, in its order. `parts` holds what the trainer is made of.

    Args:
        config: an `RLRConfig`, or TRL's `DDPOConfig` or `AlignPropConfig` (converted, see docs/migrating.md). It is copied.
        reward_function: `(images, prompts, metadata) -> rewards` or `-> (rewards, reward_metadata)`, or a list of such
            functions (`config.reward_weights`). Images are float [B, 3, H, W], videos [B, F, 3, H, W], in [0, 1].
        prompt_function: `() -> (prompt, metadata)`. Give it or `train_dataset`.
        sd_pipeline: a diffusers pipeline, an object that wraps one as `.sd_pipeline`, a local folder, or a hub id.
        image_samples_hook: called after every rollout on the main process with `(batches, global_step, tracker)`, `batches` a
            list of `[images, prompts, metadata, rewards, reward_metadata]`; `tracker.log_images(dict, step=)` always works.
        train_dataset: rows with a "prompt" column, or the path or hub id of such a dataset; the other columns reach the reward as metadata.
        eval_dataset: the same, for `evaluate()`.
        peft_config: a `peft.LoraConfig` in place of the config's.
        callbacks: `TrainerCallback`s; an `RLRCallback` also sees every rollout.
        optimizers: (optimizer, scheduler); by default AdamW of the config.
        eval_reward_function: a reward, or a list of them, for evaluation and logged pictures; by default the training's.

    Raises:
        ValueError, TypeError: input that cannot be; names field, rule and way out.
    """

    _tag_names = ["diffusers", "rlr", "reinforcement-learning", "text-to-image"]
    _name = "RLR"
    _paper = {"title": "Half-order Fine-Tuning for Diffusion Model: A Recursive Likelihood Ratio Optimizer", "id": "2502.00639"}
    args: RLRConfig
    _writing_to: Path | None = None  # where a checkpoint is being written
    _resumed_at = 0  # updates of the checkpoint that this run goes on from

    @names.explains_arguments
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
        names.check_overrides(type(self), RLRTrainer)
        self.image_samples_hook = image_samples_hook
        self.adapt_hook = functools.partial(configs.adapt_hook, config)  # the hook may be another one by the time it is called
        train_dataset, eval_dataset = open_dataset(train_dataset), open_dataset(eval_dataset, "eval_dataset")
        self.parts = Parts(
            own_config(config), reward_function, prompt_function, sd_pipeline,
            train_dataset, eval_dataset, peft_config, eval_reward_function,
        )  # fmt: skip
        pictures = self.parts.config.rollout_size * self.parts.config.world_size
        let_gloo_finish_at_exit()
        super().__init__(
            self.parts.policy, self.parts.config, operator.itemgetter(0), train_dataset, eval_dataset,
            callbacks=[RewardHackingMonitor(), DeadSignalMonitor(pictures), *(callbacks or [])], optimizers=optimizers,
        )  # fmt: skip
        self.parts.connect(self.accelerator, optimizers[0], own_evaluation=type(self).evaluate is not RLRTrainer.evaluate)
        self.uploads = HubUploads(self, self.parts.processes)
        observers = self.parts.observers(self.fixed_samples, lambda: running.trackers(self))
        self.callback_handler.callbacks = in_own_form(self.callback_handler.callbacks)
        self.callback_handler = RolloutCallbackHandler(self.callback_handler, observers)
        running.prepare(self)

    def __getattr__(self, name: str) -> Any:
        return names.read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(names.check_assignment(self, name), value)

    # ---- training ----

    def get_train_dataloader(self) -> DataLoader:
        """One placeholder per micro-batch of an epoch: prompts are drawn by the rollout. See `RLRConfig` for what an epoch is."""
        return running.placeholders(self.args, self.parts.collector)

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
            resume_from_checkpoint: a checkpoint folder, or True for the last one in `output_dir`; a number is `epochs`, as in DDPOTrainer.
            epochs: in place of `config.num_train_epochs` and `max_steps`.

        Raises:
            ValueError: `output_dir` holds another run; CheckpointError: the checkpoint cannot be used.
            SystemExit: SIGTERM came; a checkpoint was saved (exit code 143). KeyboardInterrupt: Ctrl-C came; the same.
        """
        folder = running.start(self, resume_from_checkpoint, epochs)
        try:
            with self.parts.termination.taken(), bars_closed(self.callback_handler.callbacks):
                output = super().train(folder, trial, ignore_keys_for_eval)
        except Exception as error:
            running.name_the_way_on(self, error)
            raise
        self.uploads.at_end()
        return output

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Accumulates the gradient of one micro-batch; samples a rollout first when the last one is used up."""
        parts, args = self.parts, self.args
        model.eval()  # dropout would make the policy that is trained another one than that which sampled
        if not parts.queue:
            running.start_rollout(self, model)
        on_policy = len(parts.queue) > (args.updates_per_rollout - 1) * args.gradient_accumulation_steps
        batch = parts.queue.pop()
        if args.offload_rollouts:
            batch = batch.to(self.accelerator.device)
        started, backward = time.perf_counter(), running.Backward(self)
        ends_update = self.accelerator.sync_gradients
        metrics = parts.updater.accumulate(model, batch, backward, backward.factor, on_policy, ends_update)
        if ends_update:
            metrics |= parts.updater.finish(batch, backward.set_up(), f"update {self.state.global_step + 1}")
        parts.metrics.add(metrics | {"time/backward": time.perf_counter() - started})
        return torch.tensor(metrics["loss"], device=self.accelerator.device) / args.gradient_accumulation_steps

    def _send_telemetry(self) -> None:
        """TRL reports the use of trainers on its base; this library reports nothing."""

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.parts.between_rollouts.hold(self.control, inside=bool(self.parts.queue))
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what rollouts and updates took down since the last log line."""
        if "loss" in logs:
            logs |= self.parts.metrics.take(self.parts.processes)
            logs["reward_queries"] = self.parts.rewards.queries * self.accelerator.num_processes
        super().log(logs, start_time)

    def diagnose(self, **options: Any) -> Any:
        """Measures plans on this trainer's model and reward and proposes one; see `rlr_trainer.diagnosis.diagnose`."""
        from rlr_trainer.diagnosis import diagnose

        return diagnose(self, **options)

    # ---- pictures and evaluation ----

    def generate(
        self,
        prompts: Sequence[str | Sequence[str]],
        negative_prompts: Sequence[str] | None = None,
        *,
        seed: int = 0,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensor:
        """Pictures of the present policy, [N, 3, H, W] (videos [N, F, 3, H, W]) in [0, 1] on the CPU, the same on every process. Collective.

        Args:
            prompts: N strings, or N sequences of strings, one per scale of `prompt_scales`.
            negative_prompts: N strings; None takes the run's.
            seed: with i, of the noise of picture i.
            metadata: N mappings, for pipelines that are conditioned on more than the prompt: an "image" for Kontext.
        """
        rows = running.prompt_rows(prompts, negative_prompts, metadata)
        return self.parts.evaluator.generate(running.present_model(self), rows, [(i,) for i in range(len(rows))], seed)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Rewards on the prompts of `eval_dataset`, `eval_images_per_prompt` pictures each, with the same noise every time. Collective.

        Args:
            eval_dataset: rows with a "prompt" column, or name -> rows; None takes the trainer's.
            metric_key_prefix: first word of the metrics; datasets by name add theirs, as in Trainer (`eval_<name>_reward`).

        Returns:
            `eval_reward`, `eval_reward_std`, `eval_samples_dropped`, and `eval_rewards/<name>/mean` and `/std` per reward function.

        Raises:
            ValueError, RewardError: there are no prompts; a reward fails, or all are NaN.
        """
        return running.evaluate(self, eval_dataset, metric_key_prefix)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("predict: generate(prompts, seed=...) gives pictures, evaluate(dataset) rewards")

    def fixed_samples(self) -> FixedSamples:
        """`num_log_images` pictures of the same prompts and noise every time. Collective."""
        return running.take_pictures(self)

    # ---- saving and loading ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained weights, from the main process; every process must call it."""
        running.save_model(self, super().save_model, output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        running.save_files(self, Path(output_dir or self.args.output_dir))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes the trained weights and a model card: LoRA weights for `load_lora_weights`, or the whole pipeline."""
        self.save_model(str(save_directory), _internal_call=True)
        write_model_card(self, Path(save_directory))

    def create_model_card(  # type: ignore[override]  # TRL's signature, not transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes README.md to `output_dir`, with how to load the weights and the settings of the run."""
        write_model_card(self, Path(self.args.output_dir), model_name, dataset_name, tags)

    def push_to_hub(  # type: ignore[override]  # Trainer's first argument is the commit message, DDPOTrainer's the repository
        self,
        repo_id: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *,
        commit_message: str = "End of training",
        private: bool | None = None,
        branch: str | None = None,
        **card: Any,
    ) -> Any:
        """Uploads the trained weights and the model card. What fails on the way is logged, not raised.

        Args:
            repo_id: "owner/name" or "name"; None takes `config.hub_model_id`, or the name of `output_dir`. A text with spaces is the commit
                message, as in Trainer.
            blocking, token, revision, commit_message: as in Trainer; `branch` is another name of `revision`.
            private: make the repository private when it is created.
            card: `model_name`, `dataset_name`, `tags`, see `create_model_card`.
        """
        card |= {"blocking": blocking, "token": token, "revision": revision or branch}
        return self.uploads.push(super().push_to_hub, repo_id, private, commit_message, **card)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing_to is None else str(self._writing_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        running.save_checkpoint(self, super()._save_checkpoint, model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.is_world_process_zero():
            self.parts.run_state.save(Path(output_dir))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # with save_strategy="best" Trainer saves if this is true: a run that leaves saves whatever the evaluation says
        return super()._determine_best_metric(metrics, trial) or self.parts.termination.stopped

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writing_to is None:  # a push reads the folder while training goes on: it must have its name by then
            push = super()._push_from_checkpoint
            self.uploads.at_save(lambda: push(checkpoint_folder))

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self.uploads.warn_of_failures()

    def set_initial_training_values(self, *arguments: Any, **keywords: Any) -> Any:
        """Trainer's; without an epoch left where a run is resumed that has all its updates: Trainer would do one more."""
        return running.without_an_epoch_too_many(super().set_initial_training_values(*arguments, **keywords), self._resumed_at)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.parts.weights.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            follow_schedule(self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            load_generators_of_main_process(Path(checkpoint), self.args.process_index, self.args.world_size)
