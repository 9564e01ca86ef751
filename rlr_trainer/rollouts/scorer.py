"""From latents to rewards and their gradients, for the batches of one rollout."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.first_order import NonDifferentiableRewardError
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.pipelines import PipelineAdapter
from rlr_trainer.rewards.interface import RewardCalls, RewardError, RewardResult, Rewards
from rlr_trainer.training.config import RLRConfig


def check_rewards(rewards: Rewards, config: RLRConfig, plan: EstimatorPlan, processes: int, evaluates: bool) -> None:
    """Refuses group-wise and async rewards where they cannot work.

    Args:
        evaluates: whether these rewards are to score an eval_dataset too.

    Raises:
        ValueError, NonDifferentiableRewardError: names the options and the way out.
    """
    reason = rewards.without_graph()
    if plan.needs_differentiable_reward and reason is not None:
        raise NonDifferentiableRewardError(
            f"estimator={config.estimator!r} needs the reward's gradient, but {reason}, or choose a plan that needs none: estimator='ddpo', or "
            "fo_steps=0 with rest_estimator='lr'"
        )
    if not rewards.needs_groups:
        return
    group, size = config.num_images_per_prompt, config.sample_batch_size
    if group < 2:
        raise ValueError(
            f"a group-wise reward compares pictures of one prompt, but num_images_per_prompt={group}: set it to 2 or more"
        )
    if processes > 1 and size % group:
        raise ValueError(
            f"sample_batch_size={size} on {processes} processes: a group of num_images_per_prompt={group} pictures would be spread over "
            f"processes, and a group-wise reward needs it in one; make sample_batch_size a multiple of {group}"
        )
    if evaluates:
        raise ValueError(
            "a group-wise reward cannot score an eval_dataset, of which every prompt is sampled once: pass an "
            "eval_reward_function that scores pictures one by one, or leave eval_dataset out"
        )


@dataclasses.dataclass(frozen=True)
class Scored:
    """A sampling batch with its rewards.

    Attributes:
        images: pictures, detached.
        result: rewards, detached.
        gradient: dR/dx_0 [B, ...] of the weighted sum, or [B, K, ...] of every reward before weights; 0 for samples without a reward. None if
            the plan needs none.
    """

    images: Tensor
    result: RewardResult
    gradient: Tensor | None


class RolloutScorer:
    """Decodes and scores batches as they are sampled: `add` each, then `finish`. A context: leaving it drops calls not yet begun.

    Black-box calls may still be running after `add` (`async_rewards`). Gradients are taken inside `add`, in pieces of
    `reward_batch_size` samples, each decoded, scored and differentiated before the next.

    Args:
        adapter, rewards, plan: what scores, and whether gradients are needed.
        separately: keep the gradient of every reward apart.
        defer: keep a failure for `failure` instead of raising it, so that this process goes on to meet the others.
        on_error: in place of the rewards' own.

    Attributes:
        seconds: spent here, waiting for rewards included.
        failure: the first error, with `defer`.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        rewards: Rewards,
        plan: EstimatorPlan,
        *,
        separately: bool = False,
        defer: bool = False,
        on_error: str | None = None,
    ) -> None:
        self.adapter, self.rewards, self.plan = adapter, rewards, plan
        self.separately, self.defer, self.on_error = separately, defer, on_error
        self.seconds = 0.0
        self.failure: Exception | None = None
        self._calls = RewardCalls(rewards, on_error)
        self._images: list[Tensor] = []
        self._differentiated: list[Scored] = []

    def __enter__(self) -> RolloutScorer:
        return self

    def __exit__(self, *stopped: object) -> None:
        self._calls.close()

    def add(self, latents: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], where: str) -> None:
        """Decodes final latents [B, ...] and begins to score them."""
        if self.failure is not None:
            return
        started = time.perf_counter()
        try:
            if self.plan.needs_differentiable_reward:
                self._differentiated.append(self._differentiate(latents, prompts, metadata, where))
            else:
                with torch.no_grad():
                    self._images.append(self.adapter.decode(latents))
                self._calls.add(self._images[-1], prompts, metadata, where=where)
        except Exception as error:
            self._fail(error)
        self.seconds += time.perf_counter() - started

    def finish(self) -> list[Scored]:
        """Waits for the rewards; one entry per batch, in their order. Nothing after a deferred failure."""
        started = time.perf_counter()
        results: list[RewardResult] = []
        if self.failure is None and self._images:
            try:
                results = self._calls.finish()
            except Exception as error:
                self._fail(error)
        self.seconds += time.perf_counter() - started
        if self.failure is not None:
            return []
        return self._differentiated or [Scored(i, r, None) for i, r in zip(self._images, results, strict=True)]

    def _fail(self, error: Exception) -> None:
        if not self.defer:
            raise error
        self.failure = error

    def _differentiate(self, latents: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], where: str) -> Scored:
        size = self.rewards.batch_size or len(latents)
        calls = RewardCalls(self.rewards, self.on_error)
        images, gradients, results = [], [], []
        for first in range(0, len(latents), size):
            part = slice(first, first + size)
            x0 = latents[part].detach().requires_grad_(True)
            with torch.enable_grad():
                pictures = self.adapter.decode(x0)
                calls.add(pictures, prompts[part], metadata[part], differentiable=True, where=where)
                (result,) = calls.finish()
                gradients.append(self._gradient(result, x0, prompts[part], where))
            images.append(pictures.detach())
            results.append(result.detach())
        return Scored(torch.cat(images), RewardResult.concatenate(results), torch.cat(gradients))

    def _gradient(self, result: RewardResult, x0: Tensor, prompts: tuple[str, ...], where: str) -> Tensor:
        """dR/dx_0 [B, ...] of the total or [B, K, ...] of all rewards; 0 where there is none."""
        names = self.rewards.names if self.separately else [", ".join(self.rewards.names)]
        valid = ~torch.isnan(result.total.detach())
        found = []
        for number, name in enumerate(names):
            values = result.values[number] if self.separately else result.total
            counts = valid & ~torch.isnan(values.detach())
            (gradient,) = torch.autograd.grad(torch.where(counts, values, 0.0).sum(), x0, retain_graph=number + 1 < len(names))
            gradient = torch.where(counts.reshape(-1, *[1] * (gradient.dim() - 1)), gradient, 0.0)
            finite = torch.isfinite(gradient).flatten(1).all(1)
            if not finite.all():
                bad = [prompts[i] for i in torch.nonzero(~finite)[:, 0].tolist()]
                raise RewardError(
                    f"reward {name}: its gradient with respect to the picture is not finite for {len(bad)} of {len(prompts)} samples "
                    f"(in {where}, prompts {bad[:3]}); look for sqrt, log or a norm at 0 in the reward"
                )
            found.append(gradient)
        return torch.stack(found, 1) if self.separately else found[0]


def raise_everywhere(failure: Exception | None, accelerator: Any, where: str) -> None:
    """Raises the failure of a process, and an error that names it on all others, which would wait for it otherwise. Collective.

    Raises:
        RewardError: some process has a failure.
    """
    if accelerator.num_processes > 1:
        flag = torch.tensor([failure is not None], dtype=torch.int32, device=accelerator.device)
        failed = torch.nonzero(accelerator.gather(flag)).flatten().tolist()
        if failed and failure is None:
            named = f"process {failed[0]}" if len(failed) == 1 else f"processes {', '.join(map(str, failed))}"
            raise RewardError(
                f"scoring failed on {named} in {where}, so this process stops as well; the error is in the log of {named}"
            )
    if failure is not None:
        raise failure


def check_some_reward(values: Tensor, rewards: Rewards, errors: int, where: str) -> None:
    """Refuses a rollout with nothing to learn from.

    Args:
        values: [S], the totals of all processes.
        errors: calls that failed and were skipped, of all processes.

    Raises:
        RewardError: all are NaN.
    """
    if torch.isnan(values).all():
        failed = f" ({errors} calls failed; the last error of this process: {rewards.last_failure})" if errors else ""
        raise RewardError(
            f"{where}: all {len(values)} rewards are NaN or None, so there is nothing to learn from; check the reward "
            f"function{'s' if len(rewards.names) > 1 else ''} {', '.join(rewards.names)}{failed}"
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
