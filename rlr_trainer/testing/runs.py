"""Trainers on the pipeline that is checked: small, quiet, in a folder of their own."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlr_trainer.estimators.chain import seeded_generator
from rlr_trainer.rollouts.batches import ScoredBatch
from rlr_trainer.testing.case import SEED, Case, Sampling
from rlr_trainer.training.config import RLRConfig
from rlr_trainer.training.trainer import RLRTrainer

BATCH = 4
WARM = 0.1  # standard deviation of LoRA weights that do something


def greenness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    """A reward of pictures [B, 3, H, W] and of videos [B, F, 3, H, W]: mean green minus the mean of the other channels, [B]; differentiable.

    Mean brightness would be simpler, but the group norms of a tiny decoder leave hardly anything of it to learn.
    """
    green, others = images[..., 1, :, :], images[..., ::2, :, :]
    return green.flatten(1).mean(1) - others.flatten(1).mean(1)


@contextmanager
def folder() -> Iterator[Path]:
    """A folder that goes again."""
    with tempfile.TemporaryDirectory(prefix="check_adapter") as name:
        yield Path(name)


def make_trainer(case: Case, output: Path, reward: Callable[..., Tensor] = greenness, **options: Any) -> RLRTrainer:
    """A trainer on a fresh pipeline; prompts are drawn at random of the case's."""
    from transformers.trainer_callback import PrinterCallback

    settings: dict[str, Any] = {
        "output_dir": str(output),
        "overwrite": True,
        "sample_num_steps": case.num_steps,
        "sample_guidance_scale": case.guidance_scale,
        "negative_prompt": case.negative_prompt,
        "height": case.height,
        "width": case.width,
        "num_frames": case.num_frames,
        "per_device_train_batch_size": BATCH,
        "max_steps": 1,
        "lora_r": 4,
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "num_log_images": 0,
    }
    rows = list(zip(case.prompts, case.metadata, strict=True))
    trainer = RLRTrainer(
        RLRConfig(**(settings | dict(case.options) | options)),
        reward,
        lambda: random.choice(rows),
        case.make_adapter(case.pipeline()),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def noisy(estimator: str) -> dict[str, Any]:
    """Options with which `estimator` works on samplers whose last step adds no noise, which has no likelihood ratio: it is left out."""
    known = {field.name for field in dataclasses.fields(RLRConfig)}
    return {"estimator": estimator, **({"silent_estimator": "none"} if "silent_estimator" in known else {})}


def warm_up(parameters: Mapping[str, Tensor], std: float = WARM) -> None:
    """Random numbers in place of the zeros with which LoRA begins: with B = 0 half of the gradients are 0, and a wrong one would not show."""
    for i, (name, parameter) in enumerate(parameters.items()):
        if "lora_B" in name:
            parameter.data = std * torch.randn(parameter.shape, generator=seeded_generator(SEED, i))


def gradient(trainer: RLRTrainer) -> tuple[dict[str, Tensor], dict[str, float], ScoredBatch]:
    """The ascent direction of the trainer's own first update, by parameter; its metrics; the batch that it is of."""
    parts, model = trainer.parts, trainer.parts.policy
    model.eval()
    batches, summary = parts.collector.collect(model, 0)
    parts.updater.begin(batches, summary.valid_fraction)
    (batch,) = batches

    def ascend(surrogate: Tensor, ends_update: bool) -> float:
        surrogate.backward()
        return 1.0

    model.zero_grad()
    metrics = parts.updater.accumulate(model, batch, ascend)
    parameters = parts.policy.trainable_parameters()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()
    return found, metrics, batch


def relative_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two gradients over that of the second."""
    square = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    return (square / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def sampling_of(case: Case, trainer: RLRTrainer) -> Sampling:
    """How the trainer samples."""
    return Sampling(case, trainer.parts.adapter, trainer.parts.layout, trainer.parts.schedule)


def moved(before: Mapping[str, Tensor], module: nn.Module) -> list[str]:
    """Names of the parameters that are no longer what they were."""
    return [name for name, p in module.named_parameters() if name in before and not torch.equal(before[name], p)]
