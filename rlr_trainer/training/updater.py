"""One update of `RLRTrainer`: feedback and sweep of each micro-batch, the zeroth-order part, and what is taken down of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlr_trainer.estimators.divergence import Penalty
from rlr_trainer.estimators.prediction import FP16_LOSS_SCALE, prediction_critic
from rlr_trainer.estimators.sweep import Feedback, Sweep, SweepResult
from rlr_trainer.estimators.zeroth_order import zeroth_order
from rlr_trainer.pipelines import PipelineChain
from rlr_trainer.pipelines.reference import ReferencePolicy
from rlr_trainer.rollouts.batches import Experience
from rlr_trainer.training.evaluator import SamplingTrainer
from rlr_trainer.training.meters import GradientMeter

logger = logging.getLogger(__name__)


def check_optimizer(optimizer: Any, params: Mapping[str, nn.Parameter]) -> None:
    """Refuses an optimizer given to the trainer that would train nothing, and warns of one that leaves parameters out.

    Args:
        optimizer: or None.
        params: the trained parameters.

    Raises:
        ValueError: it has none of them.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in params.items() if id(parameter) not in held]
    if len(missing) == len(params):
        raise ValueError(
            f"optimizers: the {type(optimizer).__name__} has none of the {len(params)} trained parameters, so nothing would be learnt. LoRA "
            "weights do not exist before the trainer attaches them: attach them first (pipeline.unet.add_adapter(LoraConfig(...))) and give the "
            "optimizer those that require a gradient; or set optim and optim_args; or override create_optimizer"
        )
    if missing:
        logger.warning("optimizers: %d of %d trained parameters are in no group, such as %s", len(missing), len(params), missing[0])


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


class UpdatingTrainer(SamplingTrainer):
    """The part of `RLRTrainer` that accumulates the gradient of an update."""

    reference: ReferencePolicy | None
    _meter: GradientMeter
    _zeroth_order_gradient: dict[str, Tensor]
    _ends_update = True  # whether the present backward pass is the last of its update
    _on_policy = True  # whether the weights are those that sampled

    def _share(self) -> float:
        """Weight of one sample in an update: 1 / samples with a reward. DDP averages over processes, Trainer sums micro-batches."""
        per_process = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return 1.0 / (per_process * self._valid_fraction)

    def _feedback(self, chain: PipelineChain, experience: Experience) -> Feedback:
        assert experience.advantage is not None and experience.scale is not None
        share = self._share()
        scale = experience.scale * share
        gradient = experience.reward_gradient
        if gradient is not None:
            gradient = self.plan.fo_weight * gradient * scale.reshape(-1, *[1] * (gradient.dim() - 1))
        paired = self.plan.uses_zeroth_order and self.plan.zo_antithetic
        blocks = experience.index // 2 if paired else None
        penalty = None
        if self.reference is not None and self.args.kl_coef:
            assert experience.divergence_to_go is not None
            weight = torch.full_like(scale, self.args.kl_coef * share * self._valid_fraction)  # of all samples, rewarded or not
            penalty = Penalty(self.reference.steps_of(chain), weight, experience.divergence_to_go)
        return Feedback(
            advantage=experience.advantage * share, reward_gradient=gradient, scale=scale, blocks=blocks, penalty=penalty
        )

    @property
    def _clip_range(self) -> float | None:
        """clip_range where there is something to clip: before the first update a ratio differs from 1 by rounding alone.

        That of another batch size, over a small noise, exceeds DDPO's clip range: clipping would drop terms at random.
        """
        return None if self._on_policy else self.args.clip_range

    def _sweep(self, model: nn.Module, chain: PipelineChain, experience: Experience) -> Sweep:
        params = chain.parameters()
        synchronizes = self.accelerator.sync_gradients
        is_first_order = experience.draw.first_order

        @contextlib.contextmanager
        def scope(steps: list[int], is_last: bool) -> Iterator[None]:
            self._ends_update = is_last and synchronizes
            with contextlib.ExitStack() as stack:
                if not self._ends_update:
                    stack.enter_context(self.accelerator.no_sync(model))
                if self.args.log_estimator_norms:
                    part = "fo" if bool(is_first_order[:, steps[-1]].any()) else "ho"
                    stack.enter_context(self._meter.measuring(steps[0], part, self._backward_factor()))
                yield

        def reward(latents: Tensor) -> Tensor:
            images = self.adapter.decode(latents)
            return self.rewards(images, experience.prompts, experience.metadata, differentiable=True).total.nan_to_num()

        loss_scale = FP16_LOSS_SCALE if self.args.fp16 else 1.0
        return Sweep(
            chain,
            params,
            backward=self._backward,
            scope=scope,
            recompute=self.args.recompute,
            critic=prediction_critic(chain, params, reward, loss_scale) if self.plan.uses_prediction else None,
            control_scale=self.control_scale,
            clip_range=self._clip_range,
            mean_density=True,
        )

    def _backward(self, surrogate: Tensor) -> float:
        """Surrogates ascend the reward and optimizers descend: the sign is turned here, once."""
        if self.is_deepspeed_enabled:  # its engine takes the optimizer step itself, in the backward pass that ends the update
            engine = self.accelerator.deepspeed_engine_wrapped
            engine.backward(-surrogate, sync_gradients=self._ends_update, scale_wrt_gas=False)
        else:
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
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.scale(torch.zeros((), device=self.accelerator.device))  # sets it up, where no backward pass did
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
        if self.args.log_step_norms:
            for step, norm in self._meter.step_norms().items():
                self._metrics[f"estimator/step_grad_norm/{step}"].append(norm)
        start = int(experience.draw.start[0])
        if start >= 0:
            self._metrics["estimator/subchain_start"].append(float(start))
        if self.starts is not None:
            square = sum(n**2 for s, n in self._meter.step_norms().items() if start <= s < start + self.plan.ho_length)
            # each process measures its own samples' gradient; all must draw the next start from the same distribution
            square = self.accelerator.reduce(torch.tensor(square, device=self.accelerator.device), reduction="mean")
            self.starts.update(start, float(square) ** 0.5)
        self._meter.reset()

    def _record_sweep(self, experience: Experience, result: SweepResult) -> Tensor:
        """Takes down ratios, fits the control variate, and returns the loss: minus the surrogate objective."""
        assert experience.advantage is not None
        if self.control_scale is not None and result.critic_values:
            steps, values = zip(*result.critic_values.items(), strict=True)  # the same steps in every process
            rewards = experience.rewards.to(values[0])
            rewards, *gathered = self.accelerator.gather(torch.stack([rewards, *values], 1)).unbind(1)
            for step, value in zip(steps, gathered, strict=True):
                self.control_scale.update(step, rewards, value)
        # means over the samples with a reward, of which a micro-batch may have more than its share, or none
        objective = torch.zeros((), device=self.accelerator.device)
        if self.plan.fo_range[1] > 0:
            objective += experience.rewards.nansum().to(objective) / (len(experience) * self._valid_fraction)
        if result.log_ratios:
            ratio = torch.stack(list(result.log_ratios.values())).exp()  # [scored steps, B]
            deviation = (ratio - 1).abs()
            self._metrics["ratio/mean"].append(float(ratio.mean()))
            self._metrics["ratio/max_abs_dev"].append(float(deviation.max()))
            clip_range = self._clip_range
            self._metrics["clip_ratio"].append(float((deviation > clip_range).float().mean()) if clip_range else 0.0)
            surrogate = experience.advantage * ratio
            if clip_range:
                surrogate = torch.minimum(surrogate, experience.advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
            objective += surrogate.mean() / self._valid_fraction
        if self.args.kl_coef and experience.divergences is not None:
            objective -= self.args.kl_coef * experience.divergences.sum(1).mean().to(objective)
        self._metrics["loss"].append(-float(objective))
        return -objective / self.args.gradient_accumulation_steps
