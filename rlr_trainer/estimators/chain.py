"""The denoising chain: what a model has to offer, how it is sampled, and what a sample leaves behind.

Notation, with the paper (arXiv:2502.00639) counting t = T..1 and this package counting steps in the order of generation:

| here                    | paper       | meaning                                             |
|-------------------------|-------------|-----------------------------------------------------|
| `num_steps`             | T           | number of denoising steps                           |
| `step` = 0..T-1         | t = T-step  | step 0 acts on pure noise, step T-1 makes the sample |
| `latents[step]`         | x_t         | input of the step; `latents[T]` is the sample x_0   |
| `means[step]`           | mu_theta    | mean of the next latent given this one              |
| `stds[step]`            | sigma_t     | its standard deviation                              |
| `noises[step]`          | eps_t       | latents[step + 1] = mean + std * noise     (eq. 1)  |

Shapes: N samples, `...` the shape of one latent. Standard deviations broadcast against latents.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
# One generator for the whole batch, or one per sample: then a sample's noise does not depend on the batch it is in.
Generators = torch.Generator | Sequence[torch.Generator] | None


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to every tensor in its dataclass fields, tuples and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(item, function) for item in value)
    if isinstance(value, Mapping):
        return {name: map_tensors(item, function) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **map_tensors(vars(value), function))
    return value


@runtime_checkable
class DenoisingChain(Protocol):
    """Any object with these members can be trained: a diffusers pipeline through an adapter, or a chain of one's own.

    Two members are optional. `predict_clean(step, x, params)` returns the one-step prediction of the clean sample from
    `x = latents[step]`, [N, ...]; the control variate and the `sqdf` preset need it. `select(rows)` returns the chain of some rows
    of the batch; a chain needs it when its transitions depend on more than `x` (on a prompt, say).
    """

    @property
    def num_steps(self) -> int: ...

    def parameters(self) -> Parameters:
        """Trainable tensors by name."""

    def initial(self, num_samples: int, generator: Generators) -> Tensor:
        """Draws x_T, shape [num_samples, ...]."""

    def transition(self, step: int, x: Tensor, params: Parameters) -> tuple[Tensor, Tensor]:
        """Mean [N, ...] and standard deviation (broadcasts to [N, ...]) of the next latent given `x`."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One batch of sampled chains, free of any autograd graph.

    Attributes:
        latents: T + 1 tensors [N, ...]; `latents[0]` is noise, `latents[-1]` the sample.
        noises: T tensors [N, ...], the standard normal draws of each step.
        means: T tensors [N, ...], computed with the parameters that sampled.
        stds: T tensors that broadcast to [N, ...].
    """

    latents: tuple[Tensor, ...]
    noises: tuple[Tensor, ...]
    means: tuple[Tensor, ...]
    stds: tuple[Tensor, ...]

    @property
    def num_steps(self) -> int:
        return len(self.noises)

    @property
    def num_samples(self) -> int:
        return self.latents[0].shape[0]

    @property
    def sample(self) -> Tensor:
        """x_0, shape [N, ...]."""
        return self.latents[-1]

    def select(self, rows: Tensor) -> Rollout:
        """The rollout of some rows; `rows` is an index tensor [M]."""
        return map_tensors(self, lambda t: t[rows.to(t.device)] if _has_rows(t, self) else t)

    def sample_alone(self) -> Rollout:
        """x_0 without the chain that led to it."""
        return Rollout(self.latents[-1:], (), (), ())

    def to(self, device: torch.device | str) -> Rollout:
        """The same rollout on another device."""
        return map_tensors(self, lambda t: t.to(device))

    @staticmethod
    def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
        """Joins rollouts of the same chain along the batch."""

        def join(column: Sequence[Tensor]) -> Tensor:
            """One tensor of many rollouts; it stays a single number if it is one in all of them."""
            pairs = list(zip(column, rollouts, strict=True))
            if not any(_has_rows(t, rollout) for t, rollout in pairs):
                return column[0]
            # a step that was perturbed in one rollout alone has a std per entry there and a number in the others
            return torch.cat([t.expand_as(rollout.latents[0]) for t, rollout in pairs])

        names = [field.name for field in dataclasses.fields(Rollout)]
        columns = {name: zip(*(getattr(rollout, name) for rollout in rollouts), strict=True) for name in names}
        return Rollout(**{name: tuple(map(join, columns[name])) for name in names})


def _has_rows(tensor: Tensor, rollout: Rollout) -> bool:
    """A standard deviation may be one number for the whole batch; then it has no rows to pick or join."""
    return tensor.dim() == rollout.latents[0].dim() and tensor.shape[0] == rollout.num_samples


def mix_seed(seed: int, *numbers: int) -> int:
    """One seed (63 bits) from a run's seed and a few counters, by splitmix64's rounds: randomness without a state to save."""
    mask = 2**64 - 1
    value = seed & mask
    for number in numbers:
        value = (value ^ ((number + 1) * 0x9E3779B97F4A7C15)) & mask
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        value ^= value >> 31
    return value >> 1


def seeded_generator(seed: int, *numbers: int) -> torch.Generator:
    """A CPU generator seeded by `mix_seed`."""
    return torch.Generator().manual_seed(mix_seed(seed, *numbers))


def draw_noise(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise of the shape, dtype and device of `like` [N, ...], drawn on the generators' device."""
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return to_device(torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device), like.device)
    if len(generator) != like.shape[0]:
        raise ValueError(f"generator: got {len(generator)} generators for {like.shape[0]} samples; pass one per sample")
    rows = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype, device=g.device) for g in generator]
    return to_device(torch.stack(rows), like.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; the host does not wait for what a CUDA device has still to do."""
    return tensor.to(device, non_blocking=device.type == "cuda")  # from pageable memory, which CUDA copies aside before it returns


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which tensors of `device` keep their own precision. Shapes alone (the device "meta") know no autocast."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def next_latent(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """phi_t of eq. 1: mean + std * noise. The one place that forms it, so that replays are bit-identical."""
    return mean + std * noise


# Mean and std of a step, given the step and its input. Lets zeroth-order steps run with perturbed parameters.
StepFunction = Callable[[int, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def sample_chain(
    chain: DenoisingChain,
    num_samples: int,
    generator: Generators = None,
    *,
    step_function: StepFunction | None = None,
    paired: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Rollout:
    """Samples a chain without gradients and keeps what the estimators replay.

    Args:
        chain: the chain.
        num_samples: N.
        generator: source of the initial latent and of every step's noise.
        step_function: replaces `chain.transition` with the chain's own parameters.
        paired: samples 2k and 2k + 1 get the same noise (common random numbers for antithetic perturbations).
        on_step: called with each finished step (a progress bar).

    Raises:
        FloatingPointError: a mean, or a standard deviation, is not finite; names the step.
    """
    params = chain.parameters()
    run_step = step_function or (lambda step, x: chain.transition(step, x, params))
    if paired and num_samples % 2:
        raise ValueError(f"num_samples={num_samples}: antithetic perturbations pair the samples, so it must be even")
    repeats = 2 if paired else 1
    x = chain.initial(num_samples // repeats, generator).repeat_interleave(repeats, 0)
    latents, steps = [x], []
    for step in range(chain.num_steps):
        mean, std = run_step(step, x)
        noise = draw_noise(mean[::repeats], generator).repeat_interleave(repeats, 0)
        x = next_latent(mean, std, noise)
        latents.append(x)
        steps.append((noise, mean, std))
        if on_step is not None:
            on_step(step)
    rollout = Rollout(tuple(latents), *zip(*steps, strict=True))
    _check_finite(rollout)
    return rollout


def _check_finite(rollout: Rollout) -> None:
    """Refuses means and deviations that are not finite. Of all steps at once: a check in every step would make the host wait for the device."""
    tensors = [(name, pair[i]) for pair in zip(rollout.means, rollout.stds, strict=True) for i, name in enumerate(("mean", "std"))]
    finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in tensors]).tolist()
    if not all(finite):
        number = finite.index(False)
        name, tensor = tensors[number]
        raise FloatingPointError(
            f"step {number // 2} of {rollout.num_steps}: the {name} of the next latent, shape {tuple(tensor.shape)}, has non-finite values; "
            "lower the learning rate or the guidance scale, or use a wider precision (bf16 or float32 instead of fp16)"
        )


def as_rows(per_sample: Tensor, like: Tensor) -> Tensor:
    """[N] or [1] reshaped to broadcast against `like` [N, ...], in its dtype."""
    return per_sample.to(like).reshape(-1, *[1] * (like.dim() - 1))


def sum_over_latent(values: Tensor) -> Tensor:
    """Sums everything but the batch: [N, ...] -> [N]."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def gaussian_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2) summed over the latent, without the constant -log(2 pi) / 2 per entry. Shape [N]."""
    std = std.expand_as(mean)
    return sum_over_latent(-((x - mean) ** 2) / (2 * std**2) - std.log())


def gaussian_log_ratio(x: Tensor, mean: Tensor, std: Tensor, old_mean: Tensor, old_std: Tensor) -> Tensor:
    """log N(x; mean, std^2) - log N(x; old_mean, old_std^2), shape [N].

    In factored form, (new - old)(2x - new - old) / (2 std^2), and what other deviations add: subtracting two sums of thousands of terms
    would cost three digits. With equal deviations the addition is exactly 0, and for equal means the ratio exactly 1. There is no
    branch, because the host would have to wait for a device to tell whether the deviations are equal.
    """
    shift = (mean - old_mean) * (2 * x - mean - old_mean) / (2 * std**2)
    spread = (x - old_mean) ** 2 * (1 / (2 * old_std**2) - 1 / (2 * std**2)) - torch.log(std / old_std)
    return sum_over_latent(shift + spread)


class PerSampleChain:
    """A chain in which sample i runs with `params[name][i]`: one backward pass gives per-sample gradients.

    The transition of the wrapped chain must act on each row alone (it is mapped by `torch.vmap`).
    """

    def __init__(self, chain: DenoisingChain) -> None:
        self.chain = chain
        self.num_steps = chain.num_steps

    def parameters(self) -> Parameters:
        return self.chain.parameters()

    def initial(self, num_samples: int, generator: Generators) -> Tensor:
        return self.chain.initial(num_samples, generator)

    def transition(self, step: int, x: Tensor, params: Parameters) -> tuple[Tensor, Tensor]:
        """As the wrapped chain's; `params` have one entry per row of `x`, and the deviation gets the shape of the mean."""

        def one(row: Tensor, row_params: Parameters) -> tuple[Tensor, Tensor]:
            mean, std = self.chain.transition(step, row[None], row_params)
            return mean[0], std.expand_as(mean)[0]

        return torch.vmap(one)(x, dict(params))

    def predict_clean(self, step: int, x: Tensor, params: Parameters) -> Tensor:
        return torch.vmap(lambda row, own: predict_clean(self.chain, step, row[None], own)[0])(x, dict(params))


def predict_clean(chain: DenoisingChain, step: int, x: Tensor, params: Parameters) -> Tensor:
    """One-step prediction of the clean sample from `x = latents[step]`; at the end of the chain `x` itself."""
    if step == chain.num_steps:
        return x
    method = getattr(chain, "predict_clean", None)
    if method is None:
        raise TypeError(
            f"{type(chain).__name__} has no predict_clean(step, x, params), which control_variate=True and the sqdf preset need; add it, "
            "or choose another plan"
        )
    return method(step, x, params)
