"""Sampling pictures of a policy outside training, and scoring them: `generate`, `evaluate`, and the run's fixed pictures."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlr_trainer.estimators.chain import seeded_generator
from rlr_trainer.observing.pictures import FixedSamples, thumbnails, vector_diversity
from rlr_trainer.persistence.run_state import is_plain
from rlr_trainer.rewards.interface import RewardError
from rlr_trainer.rewards.motion import mean_frame_difference
from rlr_trainer.rollouts.batches import EVALUATION
from rlr_trainer.rollouts.processes import Processes
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts, PromptRow
from rlr_trainer.rollouts.sampler import Sampler
from rlr_trainer.rollouts.scorer import Scorer, reward_metrics

Stream = tuple[int, ...]  # numbers that, with a seed, name the noise of one picture
EvalPrompts = DatasetPrompts | dict[str, DatasetPrompts]


class Evaluator:
    """Samples and scores apart from the training, in which it leaves no trace. Its methods are collective.

    Picture i depends on the weights, its prompt, the seed and its stream, not on the batch size or the number of processes (up to
    rounding); the processes share the work.

    `sampler` has a cache of prompts of its own, `scorer` the rewards of evaluations; `batch_size` is per process; in the context
    `averaged` the policy has the weights to evaluate. `queries` counts the pictures scored so far, over all processes.
    """

    def __init__(
        self,
        sampler: Sampler,
        scorer: Scorer,
        processes: Processes,
        batch_size: int,
        averaged: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.sampler, self.scorer, self.processes = sampler, scorer, processes
        self.batch_size, self.averaged = batch_size, averaged
        self.queries = 0

    def generate(self, model: nn.Module, rows: Sequence[PromptRow], streams: Sequence[Stream], seed: int) -> Tensor:
        """One picture per row, [N, 3, H, W] (videos [N, F, 3, H, W]) in [0, 1] on the CPU; every process gets all of them."""
        with self._apart():
            return torch.cat([self._gather_pictures(*batch) for batch in self._sample(model, rows, streams, seed)])

    def score(
        self,
        model: nn.Module,
        rows: Sequence[PromptRow],
        streams: Sequence[Stream],
        seed: int,
        where: str,
        *,
        on_batch: Callable[[], None] | None = None,
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Values [N, 2 + K] (the total reward, each function's, and the motion of videos), NaN for what there is not; and what `keep` makes
        of the pictures, [N, ...]. Of all processes, on the CPU.

        Raises:
            RewardError: a reward fails.
        """
        size, first, names = self.batch_size, self.processes.index * self.batch_size, self.scorer.rewards.names
        scored = not self.scorer.rewards.needs_groups
        failure: Exception | None = None
        kept, batches = [], []
        with self._apart():
            for images, own, total in self._sample(model, rows, streams, seed):
                values = torch.full((size, 2 + len(names)), torch.nan)
                part = rows[first : first + own]
                if own and scored and failure is None:
                    try:
                        prompts, metadata = tuple(row.prompt for row in part), tuple(row.metadata for row in part)
                        result = self.scorer.rate(images[:own], prompts, metadata, where)
                        values[:own, :-1] = torch.stack([result.total, *(result.parts[name] for name in names)], 1).cpu()
                    except Exception as error:  # the other processes must not wait for this one: raised by raise_everywhere
                        failure = error
                if self._makes_videos:
                    values[:own, -1] = mean_frame_difference(images[:own]).cpu()
                batches.append(values)
                if keep is not None:
                    kept.append(self._gather_pictures(keep(images), own, total))
                if on_batch is not None:
                    on_batch()
                first += size * self.processes.count
        self.processes.raise_everywhere(failure, where)
        self.queries += len(rows) if scored else 0
        gathered = self.processes.gather(torch.stack(batches))  # [processes * batches, size, 2 + K]
        by_process = gathered.reshape(self.processes.count, len(batches), size, -1)
        return by_process.transpose(0, 1).flatten(0, 2)[: len(rows)], torch.cat(kept) if kept else None

    def evaluate(
        self,
        model: nn.Module,
        source: DatasetPrompts,
        repeats: int,
        seed: int,
        where: str,
        on_batch: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Metrics of the rewards on all prompts, `repeats` pictures each, with the same noise every time.

        Raises:
            ValueError: the reward needs groups of a prompt.
            RewardError: a reward fails, or all are NaN.
        """
        if self.scorer.rewards.needs_groups:
            raise ValueError(
                "a group-wise reward cannot score an eval_dataset, picture by picture: pass another eval_reward_function"
            )
        rows = _rows(source, repeats)
        streams = [stream(*divmod(number, repeats)) for number in range(len(rows))]
        keep = thumbnails if _share_a_prompt(rows) else None
        values, vectors = self.score(model, rows, streams, seed, where, on_batch=on_batch, keep=keep)
        differ = math.nan if vectors is None else vector_diversity(vectors, [row.prompt for row in rows])
        return self.metrics(values) | ({} if math.isnan(differ) else {"diversity": differ})

    def metrics(self, values: Tensor) -> dict[str, float]:
        """Metrics of the values [N, 2 + K] of `score`; motion of videos alone."""
        total, names = values[:, 0], self.scorer.rewards.names
        if torch.isnan(total).all():
            raise RewardError(
                f"evaluation: all {len(total)} rewards are NaN or None; check the evaluation reward {', '.join(names)}"
            )
        motion = {"motion": float(values[:, -1].nanmean())} if self._makes_videos else {}
        return reward_metrics(names, total, values[:, 1:-1]) | motion

    def metric_names(self, source: DatasetPrompts, repeats: int) -> list[str]:
        """Of what `evaluate` returns."""
        names = list(self.metrics(torch.zeros(1, 2 + len(self.scorer.rewards.names))))
        return [*names, "diversity"] if _share_a_prompt(_rows(source, repeats)) else names

    @property
    def _makes_videos(self) -> bool:
        return self.scorer.layout.num_frames is not None

    @torch.no_grad()
    def _sample(
        self, model: nn.Module, rows: Sequence[PromptRow], streams: Sequence[Stream], seed: int
    ) -> Iterator[tuple[Tensor, int, int]]:
        """Samples one picture per row, shared by the processes: batches of (pictures of this process, how many count, of all processes).

        Every process yields equally often and runs the network each time, because sharded models need all of them in each call; where the
        rows do not suffice it samples one that does not count.
        """
        model.eval()
        size, processes = self.batch_size, self.processes
        for start in range(0, len(rows), size * processes.count):
            first = start + processes.index * size
            own = range(first, min(first + size, len(rows)))
            numbers = own or range(1)
            generators = [seeded_generator(seed, EVALUATION, *streams[i]) for i in numbers]
            with processes.accelerator.autocast():
                rollout = self.sampler.sample(model, [rows[i] for i in numbers], generators)
            yield self.scorer.decode(rollout.sample), len(own), min(size * processes.count, len(rows) - start)

    def _gather_pictures(self, images: Tensor, own: int, total: int) -> Tensor:
        """The pictures of one batch of all processes, on the CPU."""
        if self.processes.count == 1:
            return images.cpu()
        missing = self.batch_size - len(images)
        return self.processes.gather(torch.cat([images, images.new_zeros(missing, *images.shape[1:])]))[:total]

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Inside, the policy has the weights to evaluate; the global random generators are, after it, as they were."""
        state = random.getstate(), np.random.get_state()  # noqa: NPY002  the caller's generator
        device = self.processes.device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), self.averaged():
                yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])  # noqa: NPY002


class FixedPictures:
    """Pictures of the same prompts and noise every time; where the prompts are fewer than the pictures each has several.

    A checkpoint holds the prompts that came from a function, because the function has gone on since. It is asked for no more than
    `at_most`, the prompts of a rollout, so that it is called as often, and in the same order, as without pictures.
    """

    def __init__(self, evaluator: Evaluator, source: FunctionPrompts | DatasetPrompts, count: int, at_most: int) -> None:
        self.evaluator, self.source, self.count, self.at_most = evaluator, source, count, at_most
        self._drawn: list[PromptRow] = []

    def rows(self) -> list[tuple[PromptRow, Stream]]:
        """(prompt, noise) of every picture; collective the first time."""
        if isinstance(self.source, DatasetPrompts):
            first = copy.copy(self.source)
            first.taken = 0
            rows = first.peek(min(self.count, len(first)))
        else:
            self._drawn = rows = self._drawn or self.evaluator.processes.of_main(self.source.peek(min(self.count, self.at_most)))
        repeats = [self.count // len(rows) + (number < self.count % len(rows)) for number in range(len(rows))]
        return [(row, stream(i, j)) for i, row in enumerate(rows) for j in range(repeats[i])]

    @property
    def batches(self) -> int:
        """Sampling batches that they take."""
        return -(-self.count // (self.evaluator.batch_size * self.evaluator.processes.count))

    def take(self, model: nn.Module, seed: int, on_batch: Callable[[], None] | None = None) -> FixedSamples:
        """The pictures of the present policy, scored; collective."""
        rows, streams = zip(*self.rows(), strict=True)
        values, images = self.evaluator.score(
            model, rows, streams, seed, "the pictures for the log", on_batch=on_batch, keep=lambda pictures: pictures
        )
        assert images is not None
        return FixedSamples(images, [row.prompt for row in rows], values[:, 0])

    def state_dict(self) -> list[tuple]:
        rows = [(row.prompt, row.metadata, row.negative_prompt, row.scale_prompts) for row in self._drawn]
        return rows if is_plain(rows) else []  # with other metadata a resumed run takes the next prompts

    def load_state_dict(self, state: list[tuple]) -> None:
        self._drawn = [PromptRow(*row) for row in state]


def eval_source(dataset: Any) -> EvalPrompts | None:
    """Prompts to evaluate on, by name if there are several datasets (a mapping, as Trainer takes it)."""
    if dataset is None or isinstance(dataset, DatasetPrompts):
        return dataset
    if isinstance(dataset, Mapping):
        if not dataset:
            raise ValueError("eval_dataset={}: names no dataset; leave it out, or give name -> rows")
        return {str(name): DatasetPrompts(rows, 0, False, f"eval_dataset[{name!r}]") for name, rows in dataset.items()}
    return DatasetPrompts(dataset, 0, False, "eval_dataset")


def _rows(source: DatasetPrompts, repeats: int) -> list[PromptRow]:
    """One row per picture of an evaluation."""
    return [row for row in source.peek(len(source)) for _ in range(repeats)]


def _share_a_prompt(rows: Sequence[PromptRow]) -> bool:
    return len({row.prompt for row in rows}) < len(rows)


def stream(row: int, repeat: int = 0) -> Stream:
    """The noise of picture `repeat` of prompt `row`; more pictures per prompt leave the first as it was."""
    return (row, repeat) if repeat else (row,)
