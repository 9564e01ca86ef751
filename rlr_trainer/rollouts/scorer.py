"""From latents to rewards, and to their gradients: the only way there is."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import as_rows
from rlr_trainer.pipelines import Layout, PipelineAdapter
from rlr_trainer.rewards.interface import RewardCalls, RewardError, RewardResult, Rewards
from rlr_trainer.rewards.values import finite_rows


@dataclasses.dataclass(frozen=True)
class Scored:
    """Samples with their rewards.

    Attributes:
        images: pictures, detached.
        result: rewards, detached.
        gradient: dR/dx_0 [B, ...] of the weighted sum, or [B, K, ...] of every reward before weights; 0 for samples without a reward. None if
            it was not asked for.
    """

    images: Tensor
    result: RewardResult
    gradient: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Decodes latents and calls the rewards.

    Attributes:
        adapter, layout: what decodes.
        rewards: what is called.
    """

    adapter: PipelineAdapter
    layout: Layout
    rewards: Rewards

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1], with a graph if the latents have one."""
        return self.adapter.decode(latents, self.layout)

    def rate(self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], where: str) -> RewardResult:
        """Rewards of pictures, without gradients."""
        return self.rewards(images, prompts, metadata, differentiable=False, where=where)

    def score(self, latents: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], where: str) -> Scored:
        """Pictures and rewards of final latents [B, ...], without gradients."""
        with torch.no_grad():
            images = self.decode(latents)
        return Scored(images, self.rate(images, prompts, metadata, where))

    def differentiable(self, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """Final latents [B, ...] -> rewards [B] with a graph; 0 for a sample without a reward."""

        def reward(latents: Tensor) -> Tensor:
            """Decodes and scores; a picture that is not finite passes no gradient on."""
            pictures = self.decode(latents)
            finite = finite_rows(pictures)
            if not finite.all() and self.rewards.on_error == "skip":
                # such a sample has no reward, but its decoder's gradient is NaN
                latents.register_hook(lambda g: torch.where(as_rows(finite, g) > 0, g, 0.0))
            return self.rewards(pictures, prompts, metadata, differentiable=True).total.nan_to_num()

        return reward

    def score_with_gradient(
        self,
        latents: Tensor,
        prompts: tuple[str, ...],
        metadata: tuple[Any, ...],
        where: str,
        *,
        separately: bool = False,
        on_error: str | None = None,
    ) -> Scored:
        """Pictures, rewards and dR/dx_0, in pieces of `reward_batch_size` samples, each decoded, scored and differentiated before the next.

        Args:
            latents, prompts, metadata, where: B samples, and what they are, for messages.
            separately: keep the gradient of every reward apart.
            on_error: in place of the rewards' own.

        Raises:
            RewardError: a reward fails, or its gradient is not finite.
            NonDifferentiableRewardError: a reward has no graph.
        """
        size = self.rewards.batch_size or len(latents)
        calls = RewardCalls(self.rewards, on_error)
        images, gradients, results = [], [], []
        for first in range(0, len(latents), size):
            part = slice(first, first + size)
            x0 = latents[part].detach().requires_grad_(True)
            with torch.enable_grad():
                pictures = self.decode(x0)
                calls.add(pictures, prompts[part], metadata[part], differentiable=True, where=where)
                (result,) = calls.finish()
                gradients.append(self._gradient(result, x0, prompts[part], where, separately))
            images.append(pictures.detach())
            results.append(result.detach())
        return Scored(torch.cat(images), RewardResult.concatenate(results), torch.cat(gradients))

    def _gradient(self, result: RewardResult, x0: Tensor, prompts: tuple[str, ...], where: str, separately: bool) -> Tensor:
        """dR/dx_0 [B, ...] of the total or [B, K, ...] of all rewards; 0 where there is none."""
        names = self.rewards.names if separately else [", ".join(self.rewards.names)]
        valid = ~torch.isnan(result.total.detach())
        found = []
        for number, name in enumerate(names):
            values = result.values[number] if separately else result.total
            counts = valid & ~torch.isnan(values.detach())
            (gradient,) = torch.autograd.grad(torch.where(counts, values, 0.0).sum(), x0, retain_graph=number + 1 < len(names))
            gradient = torch.where(as_rows(counts, gradient) > 0, gradient, 0.0)
            finite = finite_rows(gradient)
            if not finite.all():
                bad = [prompts[i] for i in torch.nonzero(~finite)[:, 0].tolist()]
                raise RewardError(
                    f"reward {name}: its gradient with respect to the picture is not finite for {len(bad)} of {len(prompts)} samples "
                    f"(in {where}, prompts {bad[:3]}); look for sqrt, log or a norm at 0 in the reward"
                )
            found.append(gradient)
        return torch.stack(found, 1) if separately else found[0]


class RolloutScoring:
    """Scores batches as they are sampled: `add` each, then `finish`. A context: leaving it drops calls not yet begun.

    Black-box calls may still be running after `add` (`async_rewards`). Gradients are taken inside `add`.

    Args:
        scorer, with_gradient: what scores, and whether gradients are needed.
        separately, on_error: as `Scorer.score_with_gradient`.
        defer: keep a failure for `failure` instead of raising it, so that this process goes on to meet the others.

    Attributes:
        seconds: spent here, waiting for rewards included.
        failure: the first error, with `defer`.
    """

    def __init__(
        self, scorer: Scorer, *, with_gradient: bool, separately: bool = False, defer: bool = False, on_error: str | None = None
    ) -> None:
        self.scorer, self.with_gradient = scorer, with_gradient
        self.separately, self.defer, self.on_error = separately, defer, on_error
        self.seconds = 0.0
        self.failure: Exception | None = None
        self._calls = RewardCalls(scorer.rewards, on_error)
        self._images: list[Tensor] = []
        self._differentiated: list[Scored] = []

    def __enter__(self) -> RolloutScoring:
        return self

    def __exit__(self, *stopped: object) -> None:
        self._calls.close()

    def add(self, latents: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], where: str) -> None:
        """Decodes final latents [B, ...] and begins to score them."""
        with self.at_work():
            if self.failure is not None:
                return
            if self.with_gradient:
                scored = self.scorer.score_with_gradient(
                    latents, prompts, metadata, where, separately=self.separately, on_error=self.on_error
                )
                self._differentiated.append(scored)
                return
            with torch.no_grad():
                self._images.append(self.scorer.decode(latents))
            self._calls.add(self._images[-1], prompts, metadata, where=where)

    def finish(self) -> list[Scored]:
        """Waits for the rewards; one entry per batch, in their order. Nothing after a deferred failure."""
        with self.at_work():
            if self.failure is None and self._images:
                return [Scored(*pair) for pair in zip(self._images, self._calls.finish(), strict=True)]
        return [] if self.failure is not None else self._differentiated

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Counts the seconds, and keeps a failure with `defer`."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            if not self.defer:
                raise
            self.failure = error
        finally:
            self.seconds += time.perf_counter() - started


def check_rollout(values: Tensor, rewards: Rewards, errors: int, where: str) -> None:
    """Refuses a rollout with nothing to learn from.

    Args:
        values: [S], the totals of all processes.
        errors: calls that failed and were skipped, of all processes.

    Raises:
        RewardError: all are NaN, or so large that their variance overflows.
    """
    if torch.isnan(values).all():
        failed = f" ({errors} calls failed; the last error of this process: {rewards.last_failure})" if errors else ""
        raise RewardError(
            f"{where}: all {len(values)} rewards are NaN or None, so there is nothing to learn from; check the reward "
            f"function{'s' if len(rewards.names) > 1 else ''} {', '.join(rewards.names)}{failed}"
        )
    there = values[~torch.isnan(values)]
    if not torch.isfinite(there.square().sum()):
        raise RewardError(
            f"{where}: rewards from {float(there.min()):.3g} to {float(there.max()):.3g} are so large that their variance is no "
            f"{str(there.dtype).removeprefix('torch.')} number; bring reward {', '.join(rewards.names)} to a size near 1"
        )


def reward_metrics(names: Sequence[str], rewards: Tensor, parts: Tensor) -> dict[str, float]:
    """What is logged of a rollout's rewards: totals [S] and each function's own [S, K], all processes; NaN where there is none."""
    valid = rewards[~torch.isnan(rewards)]
    metrics = {
        "reward": float(valid.mean()),
        "reward_std": float(valid.std(correction=0)),
        "samples_dropped": float(len(rewards) - len(valid)),
    }
    for name, part in zip(names, parts.unbind(1), strict=True):
        values = part[~torch.isnan(part)]
        metrics[f"rewards/{name}/mean"] = float(values.mean()) if len(values) else float("nan")
        metrics[f"rewards/{name}/std"] = float(values.std(correction=0)) if len(values) else float("nan")
    return metrics
