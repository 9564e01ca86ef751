"""What a network is conditioned on: rows of a batch of prompts, inputs of the whole batch, and the cache of encoded prompts."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlr_trainer.estimators.chain import map_tensors

CACHE_BYTES = 2**30  # a prompt takes 118 kB for Stable Diffusion 1.5 in half precision, and about 4 MB for models with T5

Rows = Mapping[str, Tensor]  # name -> [N, ...]


def join_rows(parts: Sequence[Rows]) -> dict[str, Tensor]:
    """Joins rows along the batch. Sequences of other lengths are padded with zeros at their end: a mask among the rows says which count."""
    return {name: _join([part[name] for part in parts]) for name in parts[0]}


def _join(tensors: Sequence[Tensor]) -> Tensor:
    longest = max(tensor.shape[1] if tensor.dim() > 1 else 0 for tensor in tensors)
    same = [t if t.dim() < 2 else pad(t, [0] * (2 * t.dim() - 3) + [longest - t.shape[1]]) for t in tensors]
    return torch.cat(same)


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the network is conditioned on in a batch of N samples.

    Attributes:
        positive: name -> [N, ...], keyword arguments of the network, one row per sample.
        negative: the same for the unconditional branch, or None without guidance.
        guidance_scale: w in output = unconditional + w (conditional - unconditional).
        batch: keyword arguments that belong to the whole batch and are the same for any rows of it (position ids, shapes).
        guidance_rescale: share phi of the rescaled output in the guided one (arXiv:2305.08891, eq. 16); 0 for none.
    """

    positive: Rows
    negative: Rows | None
    guidance_scale: float
    batch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance_rescale: float = 0.0

    def select(self, rows: Tensor) -> Conditioning:
        """The conditioning of some rows."""
        positive, negative = map_tensors((self.positive, self.negative), lambda t: t[rows.to(t.device)])
        return dataclasses.replace(self, positive=positive, negative=negative)

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditioning on another device."""
        return map_tensors(self, lambda t: t.to(device))

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins conditionings of the same kind along the batch."""
        negatives = [part.negative for part in parts if part.negative is not None]
        positive = join_rows([part.positive for part in parts])
        return dataclasses.replace(parts[0], positive=positive, negative=join_rows(negatives) if negatives else None)

    def at(self, step: int) -> Conditioning:
        """The conditioning of a step."""
        return self

    def guided(self) -> dict[str, Tensor]:
        """Rows of one network call with guidance: negative rows first, then positive."""
        return dict(self.positive) if self.negative is None else join_rows([self.negative, self.positive])


@dataclasses.dataclass(frozen=True)
class ScaledConditioning:
    """Conditioning that changes along the chain: Diffusive Chain-of-Thought (section 3.3 of arXiv:2502.00639).

    Attributes:
        scales: one conditioning per group of steps, coarse to fine.
        first_steps: the step at which each group but the first begins, increasing.
    """

    scales: tuple[Conditioning, ...]
    first_steps: tuple[int, ...]

    def at(self, step: int) -> Conditioning:
        """The conditioning of a step."""
        return self.scales[sum(step >= first for first in self.first_steps)]

    def select(self, rows: Tensor) -> ScaledConditioning:
        """The conditioning of some rows."""
        return ScaledConditioning(tuple(scale.select(rows) for scale in self.scales), self.first_steps)

    def to(self, device: torch.device | str) -> ScaledConditioning:
        """The same conditioning on another device."""
        return map_tensors(self, lambda t: t.to(device))

    @staticmethod
    def concatenate(parts: Sequence[ScaledConditioning]) -> ScaledConditioning:
        """Joins conditionings with the same groups along the batch."""
        groups = zip(*(part.scales for part in parts), strict=True)
        return ScaledConditioning(tuple(Conditioning.concatenate(group) for group in groups), parts[0].first_steps)


AnyConditioning = Conditioning | ScaledConditioning


class PromptCache:
    """Encoded prompts, each encoded once; the ones longest unused go when they take more than `max_bytes`.

    An encoder's last bit depends on the prompts encoded together: what samples apart from the training has a cache of its own.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._rows: OrderedDict[tuple[str, str], dict[str, Tensor]] = OrderedDict()

    def rows(
        self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Rows], keep: Sequence[str] = (), kind: str = ""
    ) -> dict[str, Tensor]:
        """The rows of a batch of prompts.

        Args:
            prompts: N of them.
            encode: prompts -> rows; called once with all that are missing.
            keep: prompts that are asked for next, encoded with the others.
            kind: keeps apart what is encoded in different ways.
        """
        wanted = list(dict.fromkeys([*prompts, *keep]))
        missing = [prompt for prompt in wanted if (kind, prompt) not in self._rows]
        if missing:
            encoded = encode(missing)
            for i, prompt in enumerate(missing):
                self._rows[kind, prompt] = {name: t[i : i + 1].clone() for name, t in encoded.items()}
        joined = join_rows([self._rows[kind, prompt] for prompt in prompts])
        for prompt in wanted:
            self._rows.move_to_end((kind, prompt))
        return joined

    def shrink(self) -> None:
        """Forgets what is too much; called when a batch has its rows."""
        sizes = {prompt: sum(t.numel() * t.element_size() for t in rows.values()) for prompt, rows in self._rows.items()}
        total = sum(sizes.values())
        while total > self.max_bytes:
            prompt, _ = self._rows.popitem(last=False)
            total -= sizes[prompt]

    def __len__(self) -> int:
        return len(self._rows)
