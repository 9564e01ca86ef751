"""Sampling pictures of a policy outside training, and scoring them: `generate`, `evaluate`, and the run's fixed pictures."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlr_trainer.estimators.chain import sample_chain, seeded_generator
from rlr_trainer.observing.pictures import SAMPLES_FOLDER, FixedSamples, thumbnails, vector_diversity
from rlr_trainer.observing.trackers import HookTracker
from rlr_trainer.persistence.saving import SavingTrainer
from rlr_trainer.pipelines import Conditioning, PipelineChain, ScaledConditioning
from rlr_trainer.rewards.interface import RewardError, Rewards
from rlr_trainer.rollouts.batches import EVALUATION, RolloutSummary, condition_rows
from rlr_trainer.rollouts.collector import Collector
from rlr_trainer.rollouts.processes import of_main_process
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts, PromptRow
from rlr_trainer.rollouts.scorer import raise_everywhere, reward_metrics
from rlr_trainer.schedules.ddim import DDIMSchedule
from rlr_trainer.training.config import RLRConfig

PROMPTS_FILE = "prompts.json"
Stream = tuple[int, ...]  # numbers that, with a seed, name the noise of one picture


class SamplingTrainer(SavingTrainer):
    """The part of `RLRTrainer` that samples and evaluates."""

    eval_prompts: DatasetPrompts | dict[str, DatasetPrompts] | None
    eval_rewards: Rewards
    schedule: DDIMSchedule
    latent_shape: tuple[int, ...]
    _apart_encoded: OrderedDict[str, Any]
    _fixed_rows: list[tuple[PromptRow, Stream]] | None

    def _collector(self, model: nn.Module, on_step: Callable[[int], None] | None = None) -> Collector:
        raise NotImplementedError

    def _make_chain(self, model: nn.Module, conditioning: Conditioning | ScaledConditioning) -> PipelineChain:
        """The chain of a batch under `model`, the policy as Trainer wrapped it."""
        device = self.accelerator.device
        return PipelineChain(self.adapter, model, self.policy, self.schedule, conditioning, self.latent_shape, device)

    # ---- pictures ----

    def generate(
        self, prompts: Sequence[str | Sequence[str]], negative_prompts: Sequence[str] | None = None, *, seed: int = 0
    ) -> Tensor:
        """Pictures of the present policy, [N, 3, H, W] in [0, 1] on the CPU, sampled as in training.

        Picture i depends on the weights, its prompt, `seed` and i, not on the batch size or the number of processes (up to rounding). The
        processes share the work and each gets all pictures: call it on every one of them. It leaves no trace in the training.

        Args:
            prompts: N strings, or N sequences of strings, one per scale of `prompt_scales`.
            negative_prompts: N strings; None takes the run's.
            seed: of the noise.
        """
        negatives: Sequence[str | None] = negative_prompts or [None] * len(prompts)
        rows = [
            PromptRow(text, {}, negative) if isinstance(text, str) else PromptRow(text[-1], {}, negative, tuple(text))
            for text, negative in zip(prompts, negatives, strict=True)
        ]
        with self._apart():
            return torch.cat(
                [self._gather_pictures(*batch) for batch in self._sample(rows, [(i,) for i in range(len(rows))], seed)]
            )

    @torch.no_grad()
    def _sample(self, rows: Sequence[PromptRow], streams: Sequence[Stream], seed: int) -> Iterator[tuple[Tensor, int, int]]:
        """Samples one picture per row, shared by the processes: batches of (pictures of this process, how many count, of all processes).

        Every process yields equally often and runs the network each time, because sharded models need all of them in each call; where the
        rows do not suffice it samples one that does not count.
        """
        model = self.model_wrapped if self.is_in_train else self.model
        size, processes = self.args.sample_batch_size, self.accelerator.num_processes
        model.eval()
        for start in range(0, len(rows), size * processes):
            first = start + self.accelerator.process_index * size
            own = range(first, min(first + size, len(rows)))
            numbers = own or range(1)
            conditioning = condition_rows(self.adapter, self.args, [rows[i] for i in numbers])
            generators = [seeded_generator(seed, EVALUATION, *streams[i]) for i in numbers]
            with self.accelerator.autocast():
                rollout = sample_chain(self._make_chain(model, conditioning), len(numbers), generators)
            yield self.adapter.decode(rollout.sample), len(own), min(size * processes, len(rows) - start)

    def _gather_pictures(self, images: Tensor, own: int, total: int) -> Tensor:
        """The pictures of one batch of all processes, on the CPU."""
        if self.accelerator.num_processes == 1:
            return images.cpu()
        missing = self.args.sample_batch_size - len(images)
        padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        return self.accelerator.gather(padded)[:total].cpu()

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Sampling and scoring inside leave no trace: global random generators and encoded prompts stay as they were.

        A text encoder's result depends, in its last bit, on the prompts that it encodes together. The weights are the averaged ones.
        """
        state = random.getstate(), np.random.get_state()  # noqa: NPY002  the caller's generator
        kept, self.adapter._encoded = self.adapter._encoded, self._apart_encoded
        device = self.accelerator.device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), self.averaged_weights():
                yield
        finally:
            self._apart_encoded, self.adapter._encoded = self.adapter._encoded, kept
            random.setstate(state[0])
            np.random.set_state(state[1])  # noqa: NPY002

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Rewards on the prompts of `eval_dataset`, `eval_images_per_prompt` pictures each, with the same noise every time.

        In a distributed run the processes share the prompts and get the same metrics. It leaves no trace in the training.

        Args:
            eval_dataset: rows with a "prompt" column, or name -> rows; None takes the trainer's.
            ignore_keys: unused; Trainer passes it.
            metric_key_prefix: first word of the metrics; datasets by name add theirs, as in Trainer (`eval_<name>_reward`).

        Returns:
            `eval_reward`, `eval_reward_std`, `eval_samples_dropped`, and `eval_rewards/<name>/mean` and `/std` per reward function.

        Raises:
            ValueError: there are no prompts.
            RewardError: a reward fails, or all are NaN.
        """
        source = self.eval_prompts if eval_dataset is None else eval_source(eval_dataset)
        if source is None:
            raise ValueError("evaluate() needs prompts: pass eval_dataset to it or to the trainer")
        if self.eval_rewards.needs_groups:
            raise ValueError(
                "a group-wise reward cannot score an eval_dataset, picture by picture: pass another eval_reward_function"
            )
        if isinstance(source, dict):
            parts = [self.evaluate(prompts, ignore_keys, f"{metric_key_prefix}_{name}") for name, prompts in source.items()]
            return {name: value for part in parts for name, value in part.items()}
        started = time.perf_counter()
        repeats = self.args.eval_images_per_prompt
        rows = [row for row in source.peek(len(source)) for _ in range(repeats)]
        streams = [_stream(*divmod(number, repeats)) for number in range(len(rows))]
        self.callback_handler.eval_dataloader = range(
            -(-len(rows) // (self.args.sample_batch_size * self.accelerator.num_processes))
        )
        values, _ = self._sample_and_score(rows, streams, self.args.seed, f"the evaluation after {self.state.global_step} updates")
        metrics = self._eval_metrics(values, metric_key_prefix)
        elapsed = {f"{metric_key_prefix}_runtime": round(time.perf_counter() - started, 4)}
        self.log(metrics | elapsed | {"eval_reward_queries": self.eval_queries})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; there is no output of the network to return.

        Raises:
            NotImplementedError: always; names what there is.
        """
        raise NotImplementedError(
            "predict() returns outputs of a model on a dataset: use generate(prompts, seed=...) for pictures, or "
            "evaluate(dataset, metric_key_prefix='test') for their rewards"
        )

    def check_best_metric(self, config: RLRConfig) -> None:
        """Refuses a `metric_for_best_model` that the evaluations of the run will not have; Trainer would find out at the first one.

        Raises:
            ValueError: names the metrics that they have.
        """
        metric = config.metric_for_best_model
        extended = type(self).evaluate is not SamplingTrainer.evaluate  # by metrics of its own
        if metric is None or self.eval_prompts is None or config.eval_strategy == "no" or extended:
            return
        prefixes = [f"eval_{name}" for name in self.eval_prompts] if isinstance(self.eval_prompts, dict) else ["eval"]
        nothing = torch.zeros(1, 1 + len(self.eval_rewards.names))
        known = [name for prefix in prefixes for name in self._eval_metrics(nothing, prefix)]
        if (metric if metric.startswith("eval_") else f"eval_{metric}") not in known:
            raise ValueError(
                f"metric_for_best_model={metric!r} is none of the metrics of an evaluation: {', '.join(known)}; choose one of them, or override "
                "evaluate() to add it"
            )

    def _eval_metrics(self, values: Tensor, prefix: str) -> dict[str, float]:
        """Metrics of rewards [N, 1 + K]: the total, and each function's."""
        total = values[:, 0]
        if torch.isnan(total).all():
            raise RewardError(
                f"evaluation: all {len(total)} rewards are NaN or None; check the evaluation reward {', '.join(self.eval_rewards.names)}"
            )
        metrics = reward_metrics(self.eval_rewards.names, total, values[:, 1:])
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    def _sample_and_score(
        self, rows: Sequence[PromptRow], streams: Sequence[Stream], seed: int, where: str, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Rewards [N, 1 + K] (the total, and each function's), and with `keep` the pictures, of all processes, on the CPU."""
        size, first = self.args.sample_batch_size, self.accelerator.process_index * self.args.sample_batch_size
        names, scored = self.eval_rewards.names, not self.eval_rewards.needs_groups
        failure: Exception | None = None
        kept, batches = [], []
        with self._apart():
            for images, own, total in self._sample(rows, streams, seed):
                values = torch.full((size, 1 + len(names)), torch.nan)
                part = rows[first : first + own]
                if own and scored and failure is None:
                    try:
                        prompts, metadata = tuple(row.prompt for row in part), tuple(row.metadata for row in part)
                        result = self.eval_rewards(images[:own], prompts, metadata, differentiable=False, where=where)
                        values[:own] = torch.stack([result.total, *(result.parts[name] for name in names)], 1).cpu()
                    except Exception as error:  # the other processes must not wait for this one: raised by raise_everywhere
                        failure = error
                batches.append(values)
                if keep:
                    kept.append(self._gather_pictures(images, own, total))
                else:
                    self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                first += size * self.accelerator.num_processes
        raise_everywhere(failure, self.accelerator, where)
        self.eval_queries += len(rows) if scored else 0
        gathered = self.accelerator.gather(
            torch.stack(batches).to(self.accelerator.device)
        ).cpu()  # [processes * batches, size, 1 + K]
        by_process = gathered.reshape(self.accelerator.num_processes, len(batches), size, -1)
        return by_process.transpose(0, 1).flatten(0, 2)[: len(rows)], torch.cat(kept) if keep else None

    # ---- the run's fixed pictures ----

    def fixed_samples(self) -> FixedSamples:
        """`num_log_images` pictures of the same prompts and noise every time; collective.

        The prompts are the first of `eval_dataset`, or the first of the run's own; where they are fewer than the pictures each has several.
        """
        rows, streams = zip(*self._fixed(), strict=True)
        values, images = self._sample_and_score(rows, streams, self.args.seed, "the pictures for the log", keep=True)
        assert images is not None
        return FixedSamples(images, [row.prompt for row in rows], values[:, 0])

    def _fixed(self) -> list[tuple[PromptRow, Stream]]:
        if self._fixed_rows is None:
            count = self.args.num_log_images
            rows = self._fixed_prompts(count)
            repeats = [count // len(rows) + (number < count % len(rows)) for number in range(len(rows))]
            self._fixed_rows = [(row, _stream(i, j)) for i, row in enumerate(rows) for j in range(repeats[i])]
        return self._fixed_rows

    def _fixed_prompts(self, count: int) -> list[PromptRow]:
        source: Any = next(iter(self.eval_prompts.values())) if isinstance(self.eval_prompts, dict) else self.eval_prompts
        source = self.prompts if source is None else source
        if isinstance(source, DatasetPrompts):
            first = copy.copy(source)
            first.taken = 0
            return first.peek(min(count, len(first)))
        return of_main_process(self._fixed_function_prompts(source, count), self.accelerator)

    def _fixed_function_prompts(self, source: FunctionPrompts, count: int) -> list[PromptRow]:
        """The first prompts of a function, which a resumed run reads from a file: the function has gone on since.

        No more than the first rollout takes, so that the function is called as often, and in the same order, as without pictures.
        """
        path = Path(self.args.output_dir) / SAMPLES_FOLDER / PROMPTS_FILE
        if self.state.global_step > 0 and path.is_file():
            records = json.loads(path.read_text(encoding="utf-8"))
            return [PromptRow(p, m, n, None if s is None else tuple(s)) for p, m, n, s in records]
        rows = source.peek(min(count, self._collector(self.model).prompts_per_rollout))
        if self.is_world_process_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            records = [(row.prompt, row.metadata, row.negative_prompt, row.scale_prompts) for row in rows]
            with contextlib.suppress(TypeError):  # metadata that JSON cannot hold: a resumed run then takes the next prompts
                path.write_text(json.dumps(records), encoding="utf-8")
        return rows

    # ---- what callbacks and trackers need ----

    def trackers(self) -> HookTracker:
        """The run's trackers as they are now."""
        return HookTracker(self.callback_handler.callbacks, Path(self.args.output_dir), self.state.global_step)

    def rollout_diversity(self, summary: RolloutSummary) -> float:
        """`image_log.diversity` of a rollout, over all processes; collective."""
        vectors = torch.stack([thumbnails(batch[0]) for batch in summary.pictures])  # [batches, B, D]
        gathered = self.accelerator.gather(vectors.to(self.accelerator.device)).cpu()
        by_process = gathered.reshape(self.accelerator.num_processes, *vectors.shape)
        return vector_diversity(by_process.transpose(0, 1).flatten(0, 2), summary.prompts)

    def run_facts(self) -> dict[str, Any]:
        """What `run.json` says of the run."""
        import accelerate
        import diffusers
        import peft
        import transformers
        import trl

        import rlr_trainer

        device = self.accelerator.device
        name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
        libraries = (rlr_trainer, torch, transformers, diffusers, trl, peft, accelerate)
        return {
            "model": self.policy.config.name_or_path or type(self.adapter.pipeline).__name__,
            "rewards": self.rewards.names,
            "eval_rewards": self.eval_rewards.names,
            "plan": str(self.plan),
            "options": self.args.rlr_options(),
            "changed": self.args.changed_options(),
            "versions": {library.__name__: str(library.__version__) for library in libraries},
            "device": name,
            "processes": self.accelerator.num_processes,
            "trainable_parameters": sum(p.numel() for p in self.policy.trainable_parameters().values()),
        }


def eval_source(dataset: Any) -> DatasetPrompts | dict[str, DatasetPrompts] | None:
    """Prompts to evaluate on, by name if there are several datasets (a mapping, as Trainer takes it)."""
    if dataset is None or isinstance(dataset, DatasetPrompts):
        return dataset
    if isinstance(dataset, Mapping):
        if not dataset:
            raise ValueError("eval_dataset={}: names no dataset; leave it out, or give name -> rows")
        return {str(name): DatasetPrompts(rows, 0, False, f"eval_dataset[{name!r}]") for name, rows in dataset.items()}
    return DatasetPrompts(dataset, 0, False, "eval_dataset")


def _stream(row: int, repeat: int) -> Stream:
    """The noise of picture `repeat` of prompt `row`; more pictures per prompt leave the first as it was."""
    return (row, repeat) if repeat else (row,)
