"""Small chains and rewards with known gradients, and the runs that the proof tests compare with them.

`LinearProblem` has every expectation in closed form, step by step, with and without perturbed parameters. `NonlinearChain` has
none; `pathwise_samples` is its reference, written without any of the package's estimators.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import strategies as st
from statistics_helpers import DETECTABLE, Estimate, detectable
from torch import Tensor

from rlr_trainer.estimators import GradientEstimate, estimate_gradient, leave_one_out
from rlr_trainer.estimators.advantages import ADVANTAGES, Advantages
from rlr_trainer.estimators.chain import Generators, Parameters, PerSampleChain, draw_noise
from rlr_trainer.estimators.linear_gaussian import LinearGaussianChain
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.prediction import leave_one_out_mean

NUM_SAMPLES = 2**17
MAX_CHUNKS = 16
SEED_SHIFT = int(os.environ.get("RLR_TEST_SEED", "0")) * 1_000_003  # other samples for the same tests: they must pass for any
NUM_STEPS = 4
EXACT = {"rtol": 0.0, "atol": 1e-8}  # of comparisons in float64
BATCH = 4  # in tests of baselines: their mistakes are of order 1 / batch, invisible in a batch of 2^17


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def derivative(function: Callable[[Tensor], Tensor | float], x: Tensor, step: float = 1e-3) -> Tensor:
    """Central differences of fourth order, entry by entry; float64."""
    result = torch.empty_like(x)
    for index in range(x.numel()):
        values = []
        for shift in (-2, -1, 1, 2):
            moved = x.clone()
            moved.view(-1)[index] += shift * step
            values.append(function(moved))
        result.view(-1)[index] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    return result


class OffsetChain(LinearGaussianChain):
    """The linear-Gaussian chain from an initial latent that is not centred, so that the first matrix has a gradient to speak of."""

    start_mean = torch.tensor([1.5, -1.2], dtype=torch.float64)
    start_std = 0.5

    def initial(self, num_samples: int, generator: Generators) -> Tensor:
        return self.start_mean + self.start_std * super().initial(num_samples, generator)


@dataclasses.dataclass(frozen=True)
class LinearProblem:
    """A linear-Gaussian chain, a quadratic reward, and the exact gradient of what any plan estimates."""

    chain: LinearGaussianChain
    quadratic: Tensor
    linear: Tensor

    @classmethod
    def make(cls, shared: bool, num_steps: int = NUM_STEPS, seed: int = 3, stds: Sequence[float] | None = None) -> LinearProblem:
        stds = list(stds or torch.linspace(0.9, 0.6, num_steps).tolist())
        chain = OffsetChain(num_steps, 2, stds=stds, seed=seed, shared=shared)
        quadratic = torch.tensor([[0.15, 0.05], [0.05, -0.1]], dtype=torch.float64)
        return cls(chain, quadratic, torch.tensor([1.0, -0.7], dtype=torch.float64))

    @property
    def reward(self) -> Callable[[Tensor], Tensor]:
        return lambda x: ((x @ self.quadratic) * x).sum(1) + x @ self.linear

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(A, b) of every step, each use a leaf of its own."""
        params = self.chain.parameters()
        keys = [0 if self.chain.shared else step for step in range(self.chain.num_steps)]
        return [tuple(params[f"{kind}.{key}"].clone().requires_grad_() for kind in ("matrix", "bias")) for key in keys]

    def expected_reward(self, pairs: Sequence, perturbed: Sequence[bool], scale: float) -> Tensor:
        """E[R] when the perturbed steps run with theta + scale * e, e ~ N(0, I) drawn anew in every step.

        By the second moment M = E[x x^T]: a step maps it to A M A^T + A m b^T + b m^T A^T + b b^T + std^2 I, and the
        perturbation of A and b adds scale^2 (tr M + 1) I.
        """
        eye = torch.eye(2, dtype=torch.float64)
        mean = self.chain.start_mean
        moment = torch.outer(mean, mean) + self.chain.start_std**2 * eye
        for step, (matrix, bias) in enumerate(pairs):
            extra = scale**2 * (moment.trace() + 1) if perturbed[step] else 0.0
            cross = torch.outer(matrix @ mean, bias)
            moment = matrix @ moment @ matrix.mT + cross + cross.mT + torch.outer(bias, bias)
            moment = moment + (self.chain.stds[step] ** 2 + extra) * eye
            mean = matrix @ mean + bias
        return (self.quadratic * moment).sum() + self.linear @ mean

    def gradient(
        self, weights: Sequence[float] | None = None, perturbed: Sequence[bool] | None = None, scale: float = 0.0
    ) -> dict[str, Tensor]:
        """sum_t weights[t] * grad_t J, with J smoothed over the perturbed steps."""
        steps = self.chain.num_steps
        pairs = self.pairs()
        value = self.expected_reward(pairs, perturbed or [False] * steps, scale)
        shares = torch.autograd.grad(value, [leaf for pair in pairs for leaf in pair])
        return self.fold(shares, weights or [1.0] * steps)

    def fold(self, shares: Sequence[Tensor], weights: Sequence[float]) -> dict[str, Tensor]:
        """Gradients of every step's own (A, b), in the order of the steps, weighted and added up by parameter."""
        total = {name: torch.zeros_like(p) for name, p in self.chain.parameters().items()}
        for step, weight in enumerate(weights):
            key = 0 if self.chain.shared else step
            total[f"matrix.{key}"] += weight * shares[2 * step]
            total[f"bias.{key}"] += weight * shares[2 * step + 1]
        return total

    def target(self, plan: EstimatorPlan) -> dict[str, Tensor]:
        """What `plan` estimates without bias: the gradient, smoothed over the steps that it perturbs."""
        if not plan.uses_zeroth_order:
            return self.gradient()
        total = {name: torch.zeros_like(p) for name, p in self.chain.parameters().items()}
        for start, probability in enumerate(plan.start_probabilities() if plan.ho_length else [1.0]):
            covered = range(start, start + plan.ho_length)
            perturbed = [step < plan.num_steps - plan.fo_steps and step not in covered for step in range(plan.num_steps)]
            for name, g in self.gradient(perturbed=perturbed, scale=plan.zo_scale).items():
                total[name] += probability * g
        return total


class NonlinearChain:
    """x' = x + W tanh(V x + v t + b), std = exp(s) (1 + 0.3 tanh(u x)): mean and noise depend on x and on the parameters.

    The prediction of the clean sample is the remaining drift in one stride, so it is not the expected sample.
    """

    def __init__(self, num_steps: int = 4, dim: int = 2, width: int = 2, seed: int = 4) -> None:
        g = seeded(seed)

        def random(*shape: int, scale: float) -> Tensor:
            return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

        self.num_steps, self.dim = num_steps, dim
        self._parameters = {
            "out": random(dim, width, scale=0.4),
            "in": random(width, dim, scale=0.7),
            "time": random(width, scale=0.5),
            "bias": random(width, scale=0.5),
            "log_std": torch.zeros(dim, dtype=torch.float64),
            "std_slope": random(dim, dim, scale=0.5),
        }

    def parameters(self) -> Parameters:
        return self._parameters

    def initial(self, num_samples: int, generator: Generators) -> Tensor:
        return draw_noise(torch.empty(num_samples, self.dim, dtype=torch.float64), generator)

    def _drift(self, step: int, x: Tensor, params: Parameters) -> Tensor:
        time = (step + 1) / self.num_steps
        return torch.tanh(x @ params["in"].mT + time * params["time"] + params["bias"]) @ params["out"].mT

    def transition(self, step: int, x: Tensor, params: Parameters) -> tuple[Tensor, Tensor]:
        std = params["log_std"].exp() * (1 + 0.3 * torch.tanh(x @ params["std_slope"].mT))
        return x + self._drift(step, x, params), std

    def predict_clean(self, step: int, x: Tensor, params: Parameters) -> Tensor:
        return x + (self.num_steps - step) * self._drift(step, x, params)


def nonlinear_reward(x: Tensor) -> Tensor:
    """Smooth, bounded and far from quadratic."""
    return 2 * torch.tanh(x[:, 0]) - 1.5 * torch.tanh(x[:, 1] - 0.5 * x[:, 0])


def pathwise_samples(
    chain, reward: Callable[[Tensor], Tensor], num_samples: int, seed: int, perturbed: Sequence[bool] | None = None, scale=0.0
) -> dict[str, Tensor]:
    """Per-sample gradients of R(x_0) through the whole chain by plain autograd, steps perturbed as told."""
    g = seeded(seed + SEED_SHIFT)
    runner = PerSampleChain(chain)
    leaves = {name: p.detach().expand(num_samples, *p.shape).clone().requires_grad_() for name, p in chain.parameters().items()}
    x = chain.initial(num_samples, g)
    for step in range(chain.num_steps):
        params = leaves
        if perturbed is not None and perturbed[step]:
            params = {n: p + scale * torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in leaves.items()}
        mean, std = runner.transition(step, x, params)
        x = mean + std * torch.randn(mean.shape, generator=g, dtype=mean.dtype)
    return dict(zip(leaves, torch.autograd.grad(reward(x).sum(), list(leaves.values())), strict=True))


@functools.cache
def nonlinear_reference(perturbed: tuple[bool, ...] = (), scale: float = 0.0, num_samples: int = 2**19) -> Estimate:
    """The nonlinear chain's gradient, with the covariance of its own error."""
    chain = NonlinearChain()
    chunks = [
        Estimate.of(pathwise_samples(chain, nonlinear_reward, NUM_SAMPLES, 10_000 + number, perturbed or None, scale))
        for number in range(num_samples // NUM_SAMPLES)
    ]
    return Estimate.pool(chunks)


@contextlib.contextmanager
def replaced(public: object, replacement: object) -> Iterator[None]:
    """A public function or class is `replacement` wherever these tests or the estimators name it, whatever file that is in."""
    with pytest.MonkeyPatch.context() as patch:
        places = [m for name, m in sys.modules.items() if name == __name__ or name.startswith("rlr_trainer.estimators")]
        found = [(module, name) for module in places for name, value in vars(module).items() if value is public]
        assert found, f"{public} is named nowhere"
        for module, name in found:
            patch.setattr(module, name, replacement)
        yield


@contextlib.contextmanager
def batches_of(size: int) -> Iterator[None]:
    """Makes baselines see batches of `size` samples, so that one call of `estimate_gradient` acts as N / size calls.

    The package's own `leave_one_out` is run on every batch; that the centre of c is the same thing is tested in test_exact.
    """

    def baseline(rewards: Tensor, groups: Tensor | None, blocks: Tensor | None) -> Advantages:
        return leave_one_out(rewards, torch.arange(len(rewards)) // size, blocks)

    def center(values: Tensor, blocks: Tensor | None = None) -> Tensor:
        return values - baseline(values, None, blocks).values

    with replaced(leave_one_out_mean, center), pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADVANTAGES, "leave_one_out", baseline)
        yield


def group_size(plan: EstimatorPlan, advantage: str = "none") -> int:
    """How many consecutive samples depend on each other: an antithetic pair, or a batch with a common baseline."""
    if advantage != "none" or plan.uses_control_variate:
        return BATCH
    return 2 if plan.uses_zeroth_order and plan.zo_antithetic else 1


def run(chain, reward, plan: EstimatorPlan, seed: int, num_samples: int = NUM_SAMPLES, **options) -> GradientEstimate:
    """Per-sample gradients of `plan`, as many batches of BATCH samples."""
    with batches_of(BATCH):
        return estimate_gradient(chain, reward, plan, num_samples, seeded(seed + SEED_SHIFT), per_sample=True, **options)


def estimate(
    chain,
    reward,
    plan: EstimatorPlan,
    seed: int,
    target: Estimate | dict,
    num_samples: int | None = None,
    allowed: float = DETECTABLE,
    **options,
) -> Estimate:
    """Their mean with its covariance, from as many chunks of NUM_SAMPLES as it takes to see a bias of `allowed` of `target`.

    The number of chunks depends on the spread alone, not on the error, so it favours no outcome. `num_samples` fixes it.
    """
    target = target if isinstance(target, Estimate) else Estimate.exact(target)
    group = group_size(plan, options.get("advantage", "none"))
    chunks: list[Estimate] = []
    while True:
        result = run(chain, reward, plan, 1000 * seed + len(chunks), **options)
        chunks.append(Estimate.of(result.per_sample, group))
        total = Estimate.pool(chunks)
        if total.num_samples == num_samples or len(chunks) == MAX_CHUNKS:
            return total
        if num_samples is None and detectable(total, target) < 0.9 * allowed:
            return total


@st.composite
def unbiased_plans(draw, num_steps: int = NUM_STEPS) -> EstimatorPlan:
    """Any unbiased plan: K, h, start, rest, subset and weights; control variate where there is something to control."""
    fo_steps = draw(st.integers(0, num_steps))
    ho_length = draw(st.integers(0, num_steps - fo_steps))
    remaining = num_steps - fo_steps - ho_length
    options: dict = {"fo_steps": fo_steps, "ho_length": ho_length}
    if ho_length:
        options |= draw(_starts(remaining + 1))
    if remaining:
        options["rest_estimator"] = draw(st.sampled_from(["lr", "lr", "lr", "zo"]))
        if options["rest_estimator"] == "zo":
            options |= {"zo_antithetic": draw(st.booleans()), "zo_scale": 0.4}
        elif draw(st.booleans()):
            options["rest_num_steps"] = draw(st.integers(1, remaining))
            options["rest_step_weights"] = draw(st.lists(st.integers(1, 3), min_size=num_steps, max_size=num_steps))
        if options["rest_estimator"] == "lr" and not ho_length and draw(st.booleans()):
            options["fo_steps"] = (draw(st.integers(0, fo_steps)), fo_steps)
    pairs = options.get("zo_antithetic", False)
    if (ho_length or options.get("rest_estimator") == "lr") and not pairs:
        options["control_variate"] = draw(st.booleans())
    return EstimatorPlan(num_steps, **options)


@st.composite
def _starts(draw, count: int) -> dict:
    kind = draw(st.sampled_from(["uniform", "weights", "range"]))
    if kind == "weights":
        return {"ho_start_weights": draw(st.lists(st.integers(0, 3), min_size=count, max_size=count).filter(any))}
    if kind == "range":
        first = draw(st.integers(0, count - 1))
        return {"ho_start": (first, draw(st.integers(first, count - 1)))}
    return {}
