"""Short trainings: that rewards rise, in half precision too, and that a run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import seeded_generator
from rlr_trainer.testing.case import SEED, Case, Findings, largest_difference
from rlr_trainer.testing.runs import folder, make_trainer, moved, noisy, redness, warm_up
from rlr_trainer.training.trainer import RLRTrainer

LEAST_Z = 5.0  # how clear a rise must be
PICTURES = 16  # of fixed prompts and noise, before and after
CONTROLS = 8  # changes of the weights with random signs
MOST_ROUNDING = 0.25  # of bf16, as a share of the difference between two noises
UPDATES = {"rlr": 5, "draft": 5, "ddpo": 20}
SAMPLES = {"rlr": 4, "draft": 4, "ddpo": 32}


def raises_reward(estimator: str) -> Callable[[Case, Findings], None]:
    """The check that an estimator raises the redness of pictures of fixed prompts and noise.

    By more than 5 standard errors of the mean of the paired differences; and, because any change of the weights moves all pictures together, by
    more than 5 times the root mean square of what the same changes do with random signs.
    """

    def check(case: Case, findings: Findings) -> None:
        with folder() as output:
            size = {"max_steps": UPDATES[estimator], "per_device_train_batch_size": SAMPLES[estimator]}
            size |= {name: value for name, value in case.options.items() if name in size}
            trainer = make_trainer(case, output, redness, **noisy(estimator), **size)
            params = trainer.parts.policy.trainable_parameters()
            start, before = {name: p.detach().clone() for name, p in params.items()}, _rewards(trainer, case)
            trainer.train()
            change = {name: p.detach() - start[name] for name, p in params.items()}
            rise, controls = _rewards(trainer, case) - before, []
            for control in range(CONTROLS):
                for i, (name, p) in enumerate(params.items()):
                    p.data = start[name] + change[name] * _signs(change[name], control, i)
                controls.append(float((_rewards(trainer, case) - before).mean()))
        mean, error = float(rise.mean()), float(rise.std()) / len(rise) ** 0.5
        chance = (sum(value**2 for value in controls) / CONTROLS) ** 0.5
        text = (
            f"{size['max_steps']} updates moved the mean reward from {float(before.mean()):.4f} by {mean:+.4f}: {mean / error:.1f} standard "
            f"errors, and {mean / chance:.1f} times what the same changes of the weights do with random signs"
        )
        findings.require(
            min(mean / error, mean / chance) >= LEAST_Z,
            f"{text} (rule: {LEAST_Z:g} each)",
            "a learning rate that is too small or too large for this pipeline (learning_rate), weights whose change hardly changes pictures, or "
            "gradients that miss a part of the network",
        )
        findings.note(text)

    return check


def _signs(like: Tensor, *numbers: int) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=seeded_generator(SEED, *numbers)).to(like) * 2 - 1


def _rewards(trainer: RLRTrainer, case: Case) -> Tensor:
    rows = [i % len(case.prompts) for i in range(PICTURES)]
    prompts, metadata = [case.prompts[i] for i in rows], [case.metadata[i] for i in rows]
    return redness(trainer.generate(prompts, seed=SEED, metadata=metadata), prompts, ())


def bf16(case: Case, findings: Findings) -> None:
    """In bf16 an update is finite, LoRA weights stay in float32, and pictures are those of float32 up to rounding."""
    pictures: dict[str, Tensor] = {}
    for name, options in (("float32", {}), ("bf16", {"bf16": True})):
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
    kinds = {str(p.dtype) for p in params.values()}
    findings.require(
        kinds == {"torch.float32"},
        f"LoRA weights are {', '.join(sorted(kinds))} (rule: torch.float32)",
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
    findings.require(
        not differences,
        f"{len(differences)} of {len(expected)} weights differ after resuming, by up to {max(differences.values(), default=0.0):.2g} (rule: not "
        "a bit)",
        "save_lora and load_lora do not give back every weight; an adapter or network that keeps something between calls",
    )
    findings.note(f"{len(expected)} tensors are the same, bit for bit")
