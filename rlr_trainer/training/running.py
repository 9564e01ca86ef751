"""What `RLRTrainer` does around a training: its beginning, its data, its backward pass, an evaluation."""

from __future__ import annotations

import json
import logging
import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.utils import is_in_notebook

from rlr_trainer.observing.pictures import FixedSamples, thumbnails, vector_diversity
from rlr_trainer.observing.progress import RolloutBar, announce
from rlr_trainer.observing.trackers import HookTracker, connect_accelerator
from rlr_trainer.persistence.checkpoints import CheckpointStore, check
from rlr_trainer.persistence.output_folder import check_folder_to_go_on_in, free_folder
from rlr_trainer.rewards.motion import mean_frame_difference
from rlr_trainer.rewards.training_mode import layers_in_training_mode, warning_of
from rlr_trainer.rollouts.batches import RolloutSummary
from rlr_trainer.rollouts.collector import Collector
from rlr_trainer.rollouts.micro_batches import micro_batch_rows
from rlr_trainer.rollouts.processes import Processes
from rlr_trainer.rollouts.prompts import DatasetPrompts, PromptRow
from rlr_trainer.training.config import AUTO, RLRConfig
from rlr_trainer.training.evaluator import eval_source
from rlr_trainer.training.parts import FIRST_WINDOW
from rlr_trainer.training.saving import save_steps_of

logger = logging.getLogger(__name__)

CONFIG_FILE = "rlr_config.json"


def prepare(trainer: Any) -> None:
    """The last of the construction: arithmetic of the device, and an optimizer for schedulers that users make on it."""
    parts, accelerator = trainer.parts, trainer.accelerator
    _connect_trackers(trainer)
    if accelerator.device.type == "cpu":
        # Saturated rewards give denormal gradients, which slow a CPU's backward pass by 30 times and more.
        torch.set_flush_denormal(True)
    if parts.plan.scored_steps():
        lower_loss_scale(accelerator.scaler, math.prod(parts.layout.shape))
    plain = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if trainer.optimizer is None and plain and type(trainer).create_optimizer is Trainer.create_optimizer:
        trainer.create_optimizer()


def _connect_trackers(trainer: Any) -> None:
    folder, callbacks = Path(trainer.args.output_dir), trainer.callback_handler.callbacks
    connect_accelerator(trainer.accelerator, callbacks, folder, lambda: trainer.state.global_step)


def start(trainer: Any, resume_from_checkpoint: str | bool | int | None, epochs: int | None) -> str | None:
    """Makes everything ready for a training that begins, or goes on from a checkpoint; returns the checkpoint's folder. Collective.

    Raises:
        ValueError: `output_dir` holds another run.
        CheckpointError: the checkpoint cannot be used.
    """
    parts, args = trainer.parts, trainer.args
    if isinstance(resume_from_checkpoint, int) and not isinstance(resume_from_checkpoint, bool):
        resume_from_checkpoint, epochs = None, resume_from_checkpoint
    if epochs is not None:
        args.num_train_epochs, args.max_steps = epochs, -1
    resume_from_checkpoint = resume_from_checkpoint or args.resume_from_checkpoint
    if resume_from_checkpoint:
        folder = _checkpoint_to_resume(trainer, resume_from_checkpoint)
        parts.run_state.load(folder, parts.has_own_optimizer)
        stored = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        trainer._resumed_at = stored.global_step
        if not args.save_steps_chosen and stored.save_steps:
            args.save_steps = stored.save_steps
    else:
        folder, trainer._resumed_at = None, 0
        if not args.save_steps_chosen:
            args.save_steps = save_steps_of(args, updates_of(args, parts.collector))
        parts.begin_anew()
        taken, before = Path(args.output_dir), trainer.state.global_step > 0
        may_number = args.output_dir_is_default or is_in_notebook()  # there a cell is run again, and must not need another folder
        args.output_dir = str(_everywhere(trainer, lambda: free_folder(taken, args.overwrite, before, may_number)))
        _connect_trackers(trainer)
        if args.check_reward:
            announce("trying the reward on pictures of noise", is_quiet(trainer))
            _try_reward(trainer)
    if not resume_from_checkpoint or parts.unchosen():  # "auto" may be new: the checkpoint's run had no need to choose
        _choose_plan(trainer)
    return None if folder is None else str(folder)


def name_the_way_on(trainer: Any, error: Exception) -> None:
    """Adds to an error that ended a training what can be resumed."""
    said = CheckpointStore(trainer.args.output_dir).way_on()
    if said not in str(error):
        more = ": resume_from_checkpoint=True" if "can go on" in said else f"; one was due every {trainer.state.save_steps} updates"
        error.add_note(f"The training ended after {trainer.state.global_step} updates. {said}{more}.")


def _try_reward(trainer: Any) -> None:
    """Calls the reward on pictures of noise; what it does wrong is an error, or what `run.json` and the report say."""
    parts = trainer.parts
    with layers_in_training_mode([trainer.model, *parts.adapter.frozen_modules, parts.adapter.decoder]) as found:
        parts.collector.probe(trainer.model)
    parts.reward_notes = [warning_of(found, ", ".join(parts.rewards.names))] if found else []
    if found and trainer.is_world_process_zero():
        logger.warning("%s", parts.reward_notes[0])


def start_rollout(trainer: Any, model: nn.Module) -> None:
    """Collects a rollout, tells who wants to know, and fills the queue of micro-batches."""
    parts, args, rollout = trainer.parts, trainer.args, trainer.parts.rollouts_done
    with RolloutBar(args.sample_num_batches_per_epoch, trainer.plan.num_steps, is_quiet(trainer)) as bar:
        batches, summary = parts.collector.collect(model, rollout, bar.step)
    parts.updater.begin(batches, summary.valid_fraction)
    parts.metrics.add(summary.metrics | diversity(summary, parts.processes) | motion(summary, parts.processes))
    if trainer.image_samples_hook is not None and trainer.is_world_process_zero():
        hook = trainer.adapt_hook(trainer.image_samples_hook)
        hook(summary.pictures, trainer.state.global_step, trackers(trainer))
    trainer.control = trainer.callback_handler.on_rollout_end(
        args, trainer.state, trainer.control, rollout=summary, plan=trainer.plan
    )
    size, epochs = args.per_device_train_batch_size, args.num_inner_epochs
    parts.queue.fill(batches, micro_batch_rows(args.rollout_size, size, epochs, args.seed, rollout))
    parts.rollouts_done += 1


def is_quiet(trainer: Any) -> bool:
    """Whether this process shows no progress."""
    return bool(trainer.args.disable_tqdm) or not trainer.is_local_process_zero()


def take_pictures(trainer: Any) -> FixedSamples:
    """The pictures of fixed prompts and noise, under a bar. Collective."""
    pictures = trainer.parts.pictures
    with RolloutBar(pictures.batches, 1, is_quiet(trainer), "pictures of fixed prompts") as bar:
        return pictures.take(present_model(trainer), trainer.args.seed, lambda: bar.step(0))


def trackers(trainer: Any) -> HookTracker:
    """The run's trackers as they are now."""
    return HookTracker(trainer.callback_handler.callbacks, Path(trainer.args.output_dir), trainer.state.global_step)


def _checkpoint_to_resume(trainer: Any, asked: str | bool | Path) -> Path:
    """The checkpoint folder that `resume_from_checkpoint` means, found and checked by the main process for all."""
    output = Path(trainer.args.output_dir)

    def find() -> Path:
        if isinstance(asked, bool):
            return CheckpointStore(output).last_complete()
        check(Path(asked))
        check_folder_to_go_on_in(output, Path(asked), trainer.args.overwrite)
        return Path(asked)

    return _everywhere(trainer, find)


def _everywhere(trainer: Any, function: Callable[[], Any]) -> Any:
    """What the function returns on the main process, on all; what it raises there, too."""
    answer: Any = None
    if trainer.is_world_process_zero():
        try:
            answer = function()
        except ValueError as error:
            answer = error
    answer = trainer.parts.processes.of_main(answer)
    if isinstance(answer, ValueError):
        raise answer
    return answer


def _choose_plan(trainer: Any) -> None:
    """Replaces "auto" by what a measurement on this model and reward finds, and says how the plan is biased."""
    parts = trainer.parts
    while parts.unchosen():
        name = parts.unchosen()[0]
        chosen, reason = _measured(trainer, name)
        parts.choose(**chosen)
        parts.reasons |= dict.fromkeys(chosen, reason)
        listed = ", ".join(f"{option} = {value}" for option, value in chosen.items())
        logger.warning("%s='auto': chose %s of %d steps, %s", name, listed, trainer.plan.num_steps, reason)
    for reason in trainer.plan.biases():
        logger.warning("the gradient estimate is biased: %s%s", reason, "" if trainer.parts.windows is None else FIRST_WINDOW)


def _measured(trainer: Any, name: str) -> tuple[dict[str, int], str]:
    """What a diagnosis proposes for an option that is "auto", and why."""
    from rlr_trainer.diagnosis import auto_fo_steps, auto_ho_length, auto_noise_steps

    if name == "noise_steps":
        window, windows = auto_noise_steps(trainer)
        chosen = {"noise_steps": window.noise_steps}
        return chosen | ({"fo_steps": window.fo_steps} if trainer.args.fo_steps == AUTO else {}), window.reason(windows)
    if name == "fo_steps":
        return {name: auto_fo_steps(trainer)}, "where the measured variance of first order and likelihood ratio together is least"
    if trainer.args.recompute in ("recursive", "auto"):
        logger.warning("ho_length='auto': with recompute='recursive' memory is that of one step for any h and does not bind")
    length = auto_ho_length(trainer, float(trainer.args.memory_budget_gb or 0), fo_steps=trainer.plan.fo_range[1])
    return {name: length}, "by formula (8) of arXiv:2502.00639 with measured noise and memory"


def without_an_epoch_too_many(values: tuple[Any, ...], resumed_at: int) -> tuple[Any, ...]:
    """What Trainer's `set_initial_training_values` says, without an epoch left where all updates are done."""
    epochs, updates_per_epoch, max_steps = values[0], values[1], values[-1]
    if resumed_at < max_steps:
        return values
    logger.warning("nothing is left to train: %d updates are done, and %d were asked for", resumed_at, max_steps)
    return min(epochs, resumed_at // updates_per_epoch), *values[1:]


def updates_per_epoch(args: RLRConfig, collector: Collector) -> int:
    """Those of one rollout, or of as many as a pass over a dataset's prompts takes."""
    rollouts = 1
    if isinstance(collector.prompts, DatasetPrompts):
        samples = len(collector.prompts) * collector.samples_per_prompt
        rollouts = -(-samples // (args.rollout_size * collector.processes.count))
    return rollouts * args.updates_per_rollout


def updates_of(args: RLRConfig, collector: Collector) -> int:
    """Of the whole run."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates_per_epoch(args, collector))


def placeholders(args: RLRConfig, collector: Collector) -> DataLoader:
    """One placeholder per micro-batch of an epoch: one rollout, or as many as a pass over a dataset's prompts takes."""
    count = updates_per_epoch(args, collector) * args.gradient_accumulation_steps
    numbers: Any = [{"micro_batch": number} for number in range(count)]  # Trainer counts them, the rollout makes the micro-batches
    return DataLoader(numbers, collate_fn=operator.itemgetter(0), generator=torch.Generator())


class Backward:
    """The backward pass of a surrogate, by accelerate or DeepSpeed. Surrogates ascend the reward and optimizers descend: the sign is turned
    here, once.
    """

    def __init__(self, trainer: Any) -> None:
        self.accelerator, self.with_engine = trainer.accelerator, trainer.is_deepspeed_enabled

    @property
    def factor(self) -> float:
        """What gradients are multiplied by: the sign, and the loss scale of fp16."""
        scaler = self.accelerator.scaler
        return -(scaler.get_scale() if scaler is not None else 1.0)

    def set_up(self) -> float:
        """The factor, with the scaler set up, where no backward pass did it."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.scale(torch.zeros((), device=self.accelerator.device))
        return self.factor

    def __call__(self, surrogate: Tensor, ends_update: bool) -> float:
        """Differentiates a surrogate; returns the factor."""
        if self.with_engine:  # it takes the optimizer step itself, in the backward pass that ends the update
            engine = self.accelerator.deepspeed_engine_wrapped
            engine.backward(-surrogate, sync_gradients=ends_update, scale_wrt_gas=False)
        else:
            self.accelerator.backward(-surrogate)
        return self.factor


def diversity(summary: RolloutSummary, processes: Processes) -> dict[str, float]:
    """The metric diversity of a rollout, over all processes; nothing where no prompt has two pictures. Collective."""
    vectors = torch.stack([thumbnails(batch[0]) for batch in summary.pictures])  # [batches, B, D]
    by_process = processes.gather(vectors).reshape(processes.count, *vectors.shape)
    value = vector_diversity(by_process.transpose(0, 1).flatten(0, 2), summary.prompts)
    return {} if math.isnan(value) else {"diversity": value}


def motion(summary: RolloutSummary, processes: Processes) -> dict[str, float]:
    """The metric motion of a rollout of videos, over all processes; nothing of pictures. Collective."""
    if summary.pictures[0][0].dim() != 5:
        return {}
    value = float(processes.gather(torch.cat([mean_frame_difference(batch[0]) for batch in summary.pictures])).nanmean())
    return {} if math.isnan(value) else {"motion": value}


def present_model(trainer: Any) -> nn.Module:
    """The policy, as it is wrapped at the moment."""
    return trainer.model_wrapped if trainer.is_in_train else trainer.model


def prompt_rows(
    prompts: Sequence[str | Sequence[str]],
    negative_prompts: Sequence[str] | None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> list[PromptRow]:
    """Texts, or one text per scale, as prompts."""
    negatives: Sequence[str | None] = negative_prompts or [None] * len(prompts)
    rows: Sequence[Mapping[str, Any]] = metadata or [{}] * len(prompts)
    return [
        PromptRow(text, row, negative) if isinstance(text, str) else PromptRow(text[-1], row, negative, tuple(text))
        for text, row, negative in zip(prompts, rows, negatives, strict=True)
    ]


def save_files(trainer: Any, folder: Path) -> None:
    """Writes the trained weights, for a checkpoint or as a result, and the options that made them."""
    if not trainer.args.should_save:  # newer versions of transformers call this on every process
        return
    folder.mkdir(parents=True, exist_ok=True)
    weights = trainer.parts.weights
    (weights.save_result if trainer._writing_to is None else weights.save)(folder)
    options = trainer.args.rlr_options() | trainer.parts.chosen  # who samples with the weights needs what "auto" stood for
    (folder / CONFIG_FILE).write_text(json.dumps(options, indent=2, default=str))


def save_model(trainer: Any, save: Callable[..., None], output_dir: str | None, internal: bool) -> None:
    """Trainer's `save`; with FSDP the whole weights, put together from those of the processes."""
    if not trainer.is_fsdp_enabled:
        save(output_dir, internal)
        return
    with trainer.parts.weights.whole():
        trainer._save(output_dir)
    if trainer.args.push_to_hub and not internal:
        trainer.push_to_hub(commit_message="Model save")


def shortened(log: list[dict[str, float]], first: int = 10, most: int = 1000) -> list[dict[str, float]]:
    """The first lines of a log and the last: `most` in all. metrics.jsonl has them all, and a checkpoint must not grow with the run."""
    return log if len(log) <= most else log[:first] + log[first - most :]


def save_checkpoint(trainer: Any, save: Callable[[nn.Module, Any], None], model: nn.Module, trial: Any) -> None:
    """Trainer's `save`, into a folder that gets its name when it is whole; then rotates and uploads.

    Raises:
        OSError: it cannot be written (a full disk); nothing half written is left.
    """
    args, step = trainer.args, trainer.state.global_step
    store, weights_alone = CheckpointStore(trainer._get_output_dir(trial)), args.save_only_model
    with store.writing(step, args.should_save, trainer.accelerator.wait_for_everyone) as aside:
        trainer._writing_to = aside
        log, trainer.state.log_history = trainer.state.log_history, shortened(trainer.state.log_history)
        args.save_only_model = weights_alone and not trainer.parts.termination.stopped  # one to leave with can be resumed
        try:
            save(model, trial)
            if args.save_strategy != "no":
                store.name_best(trainer.state, aside / f"checkpoint-{step}", args.should_save)
        finally:
            trainer._writing_to, args.save_only_model, trainer.state.log_history = None, weights_alone, log
    if args.should_save:
        store.rotate(args.save_total_limit, trainer.state.best_model_checkpoint)
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(store.folder / f"checkpoint-{step}"))


def evaluate(trainer: Any, dataset: Any, prefix: str) -> dict[str, float]:
    """Evaluates, logs and tells the callbacks; of several datasets by name each by itself.

    Raises:
        ValueError: there are no prompts.
    """
    source = trainer.parts.eval_prompts if dataset is None else eval_source(dataset)
    if isinstance(source, dict):
        parts = [trainer.evaluate(prompts, metric_key_prefix=f"{prefix}_{name}") for name, prompts in source.items()]
        return {name: value for part in parts for name, value in part.items()}
    if source is None:
        raise ValueError("evaluate() needs prompts: pass eval_dataset to it or to the trainer")
    started, args, evaluator = time.perf_counter(), trainer.args, trainer.parts.evaluator
    handler, repeats = trainer.callback_handler, args.eval_images_per_prompt
    per_batch = args.sample_batch_size * trainer.accelerator.num_processes
    handler.eval_dataloader = range(-(-len(source) * repeats // per_batch))

    def on_batch() -> None:
        trainer.control = handler.on_prediction_step(args, trainer.state, trainer.control)

    where = f"the evaluation after {trainer.state.global_step} updates"
    found = evaluator.evaluate(present_model(trainer), source, repeats, args.seed, where, on_batch)
    metrics = {f"{prefix}_{name}": value for name, value in found.items()}
    elapsed = {f"{prefix}_runtime": round(time.perf_counter() - started, 4)}
    trainer.log(metrics | elapsed | {"eval_reward_queries": evaluator.queries})
    trainer.control = handler.on_evaluate(args, trainer.state, trainer.control, metrics)
    return metrics


def lower_loss_scale(scaler: Any, latent_entries: int) -> None:
    """Divides the first loss scale of fp16 by the D entries of a latent.

    It is meant for losses that are means; a likelihood-ratio surrogate is a sum over D entries. Every halving costs an update that is
    skipped, with its rollout: without this, about a dozen for Stable Diffusion.

    Args:
        scaler: torch's GradScaler, or None.
        latent_entries: D.
    """
    if scaler is not None:
        state = scaler.state_dict()
        scaler.load_state_dict(state | {"scale": state["scale"] / latent_entries})
