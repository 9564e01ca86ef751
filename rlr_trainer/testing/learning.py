"""Short trainings: that rewards rise, in half precision too, and that a run goes on where it stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rlr_trainer.estimators.chain import seeded_generator
from rlr_trainer.schedules import SamplerOptions
from rlr_trainer.testing.case import SEED, Case, Findings, largest_difference
from rlr_trainer.testing.runs import folder, greenness, make_trainer, moved, noisy, warm_up
from rlr_trainer.training.trainer import RLRTrainer

PICTURES = 16  # of fixed noise, before and after
MOST_ROUNDING = 0.25  # of bf16, as a share of the difference between two noises


@dataclasses.dataclass(frozen=True)
class _Training:
    """A short training and the chance that it is held against.

    Attributes:
        options: of the trainer.
        by_update: whether the controls turn the signs of whole updates, or of single weights.
        least: how many times the controls' root mean square the rise must be.
    """

    options: Mapping[str, Any]
    by_update: bool
    least: float


# With reward gradients every update points the same way, so the changes of single weights are the independent ones. Those of ddpo are noise for
# the most part, which moves many weights together: there the updates are, without momentum. Few steps make its noise small. Twice the root mean
# square is what a walk of random signs passes once in 40 times: a sanity check, beside those of the gradient, which are exact.
_EXACT = {"max_steps": 5, "per_device_train_batch_size": 4}
_MIXED = {"max_steps": 20, "per_device_train_batch_size": 32}  # in a small batch likelihood ratios drown the first-order part
_NOISY = {"max_steps": 40, "per_device_train_batch_size": 96, "sample_num_steps": 2, "adam_beta1": 0.0}
TRAININGS = {"rlr": _Training(_MIXED, False, 5.0), "draft": _Training(_EXACT, False, 5.0), "ddpo": _Training(_NOISY, True, 2.0)}
CONTROLS = 16
LEAST_ERRORS = 5.0  # standard errors of the mean rise over pictures


class _Updates(TrainerCallback):
    """Keeps what each update changed."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params: Mapping[str, Tensor] = params
        self.changes: list[dict[str, Tensor]] = []
        self.start = self.last = self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.params.items()}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = self._copy()
        self.changes.append({name: now[name] - self.last[name] for name in now})
        self.last = now

    def turn_signs(self, control: int, by_update: bool) -> None:
        """Gives the weights the same changes with random signs."""
        for i, (name, p) in enumerate(self.params.items()):
            changes = torch.stack([change[name] for change in self.changes])
            if by_update:
                signs = _signs((len(changes), *[1] * p.dim()), control)
                p.data = self.start[name] + (signs * changes).sum(0)
            else:
                p.data = self.start[name] + _signs(p.shape, control, i) * changes.sum(0)


def raises_reward(estimator: str, case: Case, findings: Findings) -> None:
    """An estimator raises the greenness of pictures of one prompt and fixed noise.

    Two kinds of chance are held against the rise. The noise of the pictures: the mean of the paired differences must be 5 standard errors
    above 0. The noise of the training, which moves all pictures together: the rise must be several times the root mean square of what 16
    versions of the same changes of the weights do, with random signs.
    """
    training, case = TRAININGS[estimator], dataclasses.replace(case, prompts=case.prompts[:1], metadata=case.metadata[:1])
    with folder() as output:
        trainer = make_trainer(case, output, **noisy(estimator), **_options_of(training, case))
        updates = _Updates(trainer.parts.policy.trainable_parameters())
        trainer.add_callback(updates)
        before = _rewards(trainer, case)
        trainer.train()
        rise, controls = _rewards(trainer, case) - before, []
        for control in range(CONTROLS):
            updates.turn_signs(control, training.by_update)
            controls.append(float((_rewards(trainer, case) - before).mean()))
    mean, error = float(rise.mean()), float(rise.std()) / len(rise) ** 0.5
    chance = (sum(value**2 for value in controls) / CONTROLS) ** 0.5
    text = (
        f"{len(updates.changes)} updates moved the mean reward from {float(before.mean()):.4f} by {mean:+.4f}, {mean / error:.1f} standard "
        f"errors and {mean / chance:.1f} times what these changes do with random signs"
    )
    findings.require(
        mean >= LEAST_ERRORS * error and mean >= training.least * chance,
        f"{text} (rule: at least {LEAST_ERRORS:g} and {training.least:g})",
        "a learning rate that is too small or too large for this pipeline (learning_rate), weights whose change hardly changes pictures, or "
        "gradients that are turned or miss a part of the network",
    )
    findings.note(text)


def _options_of(training: _Training, case: Case) -> dict[str, Any]:
    """The training's options, with the case's own length and batch, and no more steps than the case has."""
    own = {name: case.options[name] for name in ("max_steps", "per_device_train_batch_size") if name in case.options}
    options = {**training.options, **own}
    if "sample_num_steps" in options:
        options["sample_num_steps"] = min(options["sample_num_steps"], case.num_steps)
        options |= _noise_in_every_step(case, options["sample_num_steps"])
        options["learning_rate"] = case.learning_rate / 3  # many small steps average the noise; large ones overshoot
    return options


def _noise_in_every_step(case: Case, num_steps: int) -> dict[str, Any]:
    """A sampler that adds noise in the last step too, where the scheduler takes it: left out, that step would be half of the chain."""
    if {"sampler", "sample_eta", "noise_steps"} & set(case.options):
        return {}
    adapter = case.adapter()
    try:
        adapter.schedule(case.layout(adapter), SamplerOptions(num_steps, sampler="dance_sde"))
    except ValueError:  # not a flow scheduler
        return {}
    return {"sampler": "dance_sde"}


def _signs(shape: Sequence[int], *numbers: int) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=seeded_generator(SEED, *numbers)) * 2.0 - 1


def _rewards(trainer: RLRTrainer, case: Case) -> Tensor:
    prompts = list(case.prompts) * PICTURES
    return greenness(trainer.generate(prompts, seed=SEED, metadata=list(case.metadata) * PICTURES), prompts, ())


def bf16(case: Case, findings: Findings) -> None:
    """In bf16 an update is finite, LoRA weights stay in float32, and pictures are those of float32 up to rounding."""
    pictures: dict[str, Tensor] = {}
    kinds: dict[str, dict[str, Any]] = {"float32": {}, "bf16": {"bf16": True}}
    for name, options in kinds.items():
        with folder() as output:
            trainer = make_trainer(case, output, **noisy("rlr"), **options)
            params = trainer.parts.policy.trainable_parameters()
            warm_up(params)
            pictures[name] = trainer.generate(case.prompts, seed=SEED, metadata=case.metadata)
            if name == "float32":
                pictures["of another noise"] = trainer.generate(case.prompts, seed=SEED + 1, metadata=case.metadata)
                continue
            before = {key: p.detach().clone() for key, p in params.items()}
            trainer.train()
            count = len(moved(before, trainer.parts.policy))
    dtypes = {str(p.dtype) for p in params.values()}
    findings.require(
        dtypes == {"torch.float32"},
        f"LoRA weights are {', '.join(sorted(dtypes))} (rule: torch.float32)",
        "a `call` that casts the network",
    )
    broken = [key for key, p in params.items() if not torch.isfinite(p).all()]
    findings.require(
        not broken, f"after an update {len(broken)} of {len(params)} weights are not finite", "activations that overflow"
    )
    findings.require(
        count > len(params) / 2, f"an update moved {count} of {len(params)} weights", "gradients that vanish below bf16's precision"
    )
    rounding = float((pictures["bf16"] - pictures["float32"]).abs().mean())
    apart = float((pictures["of another noise"] - pictures["float32"]).abs().mean())
    text = f"pictures in bf16 differ from those in float32 by {rounding:.2g} on average, those of two noises by {apart:.2g}"
    findings.require(
        rounding <= MOST_ROUNDING * apart,
        f"{text} (rule: at most {MOST_ROUNDING:g} of that)",
        "times or positions that are rounded to bf16 (keep them in float32), or modules that the class keeps in float32 cast down",
    )
    findings.note(f"{text}; {count} of {len(params)} tensors moved")


def resume(case: Case, findings: Findings) -> None:
    """Two updates, a checkpoint and two more are the same weights, bit for bit, as four updates."""
    options: dict[str, Any] = {**noisy("rlr"), "save_strategy": "steps", "save_steps": 2}
    with folder() as output:
        straight = make_trainer(case, output / "straight", max_steps=4, **options)
        straight.train()
        make_trainer(case, output / "stopped", max_steps=2, **options).train()
        resumed = make_trainer(case, output / "stopped", max_steps=4, **options)
        resumed.train(resume_from_checkpoint=str(output / "stopped" / "checkpoint-2"))
    expected, found = straight.parts.policy.trainable_parameters(), resumed.parts.policy.trainable_parameters()
    differences = {name: largest_difference(found[name], p) for name, p in expected.items() if not torch.equal(found[name], p)}
    largest = max(differences.values(), default=0.0)
    findings.require(
        not differences,
        f"{len(differences)} of {len(expected)} weights differ after resuming, by up to {largest:.2g} (rule: not at all)",
        "save_lora and load_lora do not give back every weight; an adapter or network that keeps something between calls",
    )
    findings.note(f"{len(expected)} tensors are the same, bit for bit")
