"""Trained weights: that they are the right ones, that they move, and that they reach another pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rlr_trainer.pipelines.adapter import PipelineAdapter
from rlr_trainer.pipelines.lora import lora_layers
from rlr_trainer.testing.case import Case, Findings, Sampling, largest_difference
from rlr_trainer.testing.runs import folder, make_trainer, moved, sampling_of, warm_up

TOLERANCE = 1e-5  # of pictures in [0, 1] by the same weights
LEAST_EFFECT = 1e-3  # of weights that do something, on pictures
MOST = 0.5  # share of the layers with LoRA weights that must move in one update


def lora(case: Case, findings: Findings) -> None:
    """Every target binds modules that one update moves, and the saved weights give the pipeline's own loader the same pictures."""
    with folder() as output:
        trainer = make_trainer(case, output, estimator="full_bp")
        trainer.train()
        adapter = trainer.parts.adapter
        _check_layers(findings, adapter.denoiser, adapter.lora_targets)
        warm_up(trainer.parts.policy.trainable_parameters())
        trainer.save_model(str(output / "weights"))
        sampling = sampling_of(case, trainer)
        trained = _pictures(sampling)
        fresh = case.pipeline()
        how = _load_as_a_user(fresh, adapter, output / "weights")
    _check_pictures(case, findings, sampling, trained, fresh, f"read by {how}", "the prefix and the form of the keys in save_lora")


def _check_layers(findings: Findings, denoiser: Any, targets: tuple[str, ...]) -> None:
    """B, which starts at 0, must have moved: in most layers, and in some of each target."""
    layers = lora_layers(denoiser)
    alive = {name: any(bool(part.weight.any()) for part in layer.lora_B.values()) for name, layer in layers.items()}
    unused = "modules that the forward pass does not use, or whose output is thrown away, as LoRA targets; gradients that do not reach them"
    count = sum(alive.values())
    dead = [name for name, moves in alive.items() if not moves]
    findings.require(
        count > MOST * len(alive),
        f"after an update B is still 0 in {len(dead)} of {len(alive)} layers with LoRA weights: {', '.join(dead[:6])}",
        unused,
    )
    for target in targets:
        own = [moves for name, moves in alive.items() if f".{name}".endswith(f".{target}")]
        findings.require(bool(own), f"the target {target!r} binds no module", "a name that is not in this network")
        findings.require(
            not own or any(own), f"after an update B is still 0 in all {len(own)} modules of the target {target!r}", unused
        )
    findings.note(f"B moved in {count} of {len(alive)} layers" + (f" (not in {', '.join(dead)})" if dead else ""))


def _load_as_a_user(pipeline: Any, adapter: PipelineAdapter, directory: Path) -> str:
    """Loads LoRA weights with nothing of ours; says with what."""
    if hasattr(pipeline, "load_lora_weights"):
        for arguments in adapter.lora_loads:  # offline the name of the file must be given
            pipeline.load_lora_weights(str(directory), **arguments)
        return "the pipeline's load_lora_weights"
    from peft import PeftModel

    PeftModel.from_pretrained(getattr(pipeline, adapter.denoiser_folder), str(directory))
    return "peft, as the pipeline has no loader"


def whole_network(case: Case, findings: Findings) -> None:
    """Without LoRA one update moves the network, and what is saved is the same network."""
    with folder() as output:
        before = {name: p.detach().clone() for name, p in case.adapter().denoiser.named_parameters()}
        trainer = make_trainer(case, output, estimator="full_bp", use_lora=False)
        trainer.train()
        adapter = trainer.parts.adapter
        count = len(moved(before, adapter.denoiser))
        findings.require(
            count > MOST * len(before),
            f"one update moved {count} of {len(before)} tensors",
            "a part of the network that `call` does not use",
        )
        trainer.save_model(str(output / "weights"))
        sampling = sampling_of(case, trainer)
        trained = _pictures(sampling)
        fresh = case.adapter()
        fresh.load_denoiser(output / "weights")
    findings.note(f"one update moved {count} of {len(before)} tensors")
    _check_pictures(case, findings, sampling, trained, fresh.pipeline, "read by load_denoiser", "save_denoiser and load_denoiser")


def _pictures(sampling: Sampling) -> Tensor:
    return sampling.theirs(sampling.case.rows(), sampling.case.guidance_scale, sampling.noise())


def _check_pictures(case: Case, findings: Findings, sampling: Sampling, trained: Tensor, fresh: Any, how: str, hint: str) -> None:
    """An untouched pipeline with the saved weights makes the trained pipeline's pictures, which are not those of the base."""

    def of(pipeline: Any) -> Tensor:
        return _pictures(Sampling(case, case.make_adapter(pipeline), sampling.layout, sampling.schedule))

    difference, effect = largest_difference(of(fresh), trained), largest_difference(of(case.pipeline()), trained)
    findings.require(
        difference <= TOLERANCE,
        f"weights saved and {how} make pictures that differ by up to {difference:.2g} from the trained ones (rule: at most {TOLERANCE:g}; the "
        f"base's differ by {effect:.2g})",
        hint,
    )
    findings.require(
        effect >= LEAST_EFFECT,
        f"the trained weights change pictures by {effect:.2g} (rule: at least {LEAST_EFFECT:g}), so a loader that does nothing would not show",
        "LoRA on modules without effect, or a degenerate pipeline",
    )
    findings.note(f"saved and {how}: pictures equal to {difference:.1e}, {effect:.2g} away from the base's")
