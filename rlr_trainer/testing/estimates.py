"""Likelihood ratios and gradients of the trainer's own update against what they must be."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from rlr_trainer.estimators.chain import next_latent
from rlr_trainer.rollouts.batches import ScoredBatch
from rlr_trainer.testing.case import Case, Findings
from rlr_trainer.testing.runs import folder, gradient, greenness, make_trainer, noisy, relative_difference, warm_up
from rlr_trainer.training.trainer import RLRTrainer

TOLERANCE = 1e-4  # relative, of gradients


def ratio(case: Case, findings: Findings) -> None:
    """Before the first update the policy is the one that sampled: every likelihood ratio is exactly 1."""
    with folder() as output:
        trainer = make_trainer(case, output, **noisy("ddpo"))
        warm_up(trainer.parts.policy.trainable_parameters())
        _, metrics, batch = gradient(trainer)
    deviation = metrics["ratio/max_abs_dev"]
    findings.require(
        deviation == 0,
        f"the ratio of the policy to the one that sampled, itself, is off by up to {deviation:.2g} (rule: exactly 1)",
        "a network that draws random numbers (dropout), keeps something between calls, or is called otherwise in training than in sampling",
    )
    findings.note(f"exactly 1 on {len(batch)} samples" if not deviation else f"off by {deviation:.2g}")


def gradients(case: Case, findings: Findings) -> None:
    """The reward gradient by the recursion over steps is that of autograd through the whole chain and the decoder."""
    with folder() as output:
        trainer = make_trainer(case, output, estimator="full_bp", recompute="recursive")
        warm_up(trainer.parts.policy.trainable_parameters())
        ours, _, batch = gradient(trainer)
        plain = _plain(trainer, batch)
    size = max(float(g.abs().max()) for g in plain.values())
    if not findings.require(
        size > 0, "autograd finds no gradient at all", "a `decode` or `call` that leaves the graph (no_grad, detach, numpy)"
    ):
        return
    difference = relative_difference(ours, plain)
    findings.require(
        difference <= TOLERANCE,
        f"the recursion's gradient differs from plain autograd's by {difference:.2g} of its norm (rule: at most {TOLERANCE:g})",
        "a part of `predict` or `decode` that detaches, or depends on more than latents, time and conditioning",
    )
    findings.note(f"recursion and autograd differ by {difference:.1e} of the gradient's norm, over {len(plain)} tensors")


def _plain(trainer: RLRTrainer, batch: ScoredBatch) -> dict[str, torch.Tensor]:
    """d mean R / d theta with one graph through all steps and the decoder."""
    parts = trainer.parts
    chain = parts.sampler.chain(parts.policy, batch.conditioning, batch.schedule)
    params, x = chain.parameters(), batch.rollout.latents[0]
    for step, noise in enumerate(batch.rollout.noises):
        x = next_latent(*chain.transition(step, x, params), noise)
    value = greenness(parts.adapter.decode(x, parts.layout), batch.prompts, batch.metadata).mean()
    if not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in params.items()}
    found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), found, strict=True)}


def checkpointing(case: Case, findings: Findings) -> None:
    """Gradient checkpointing leaves the gradient as it is."""
    if not getattr(case.adapter().denoiser, "_supports_gradient_checkpointing", False):
        findings.note("the network's class does not support it")
        return
    found, calls = [], []
    for enabled in (False, True):
        with folder() as output:
            trainer = make_trainer(case, output, estimator="full_bp")
            warm_up(trainer.parts.policy.trainable_parameters())
            if enabled:
                trainer.parts.policy.gradient_checkpointing_enable()
            with counted_calls(trainer.parts.policy) as count:
                found.append(gradient(trainer)[0])
        calls.append(sum(count.values()))
    difference = relative_difference(found[1], found[0])
    findings.require(
        difference <= TOLERANCE,
        f"the gradient with checkpointing differs by {difference:.2g} of its norm (rule: at most {TOLERANCE:g})",
        "a network that gives other outputs when a block runs a second time",
    )
    findings.require(
        calls[1] > calls[0],
        f"an update calls {calls[1]} modules with checkpointing and {calls[0]} without (rule: more): nothing is checkpointed",
        "a network in inference mode, or a `call` without gradients",
    )
    findings.note(f"gradients with and without differ by {difference:.1e} of their norm; module calls {calls[0]} -> {calls[1]}")


@contextlib.contextmanager
def counted_calls(module: nn.Module) -> Iterator[Counter[str]]:
    """Counts the calls of the modules inside, by name."""
    count: Counter[str] = Counter()
    hooks = [part.register_forward_hook(lambda *_, name=name: count.update([name])) for name, part in module.named_modules()]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()
