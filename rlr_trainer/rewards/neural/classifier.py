"""The probability that an image classifier gives a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rlr_trainer.rewards.neural.base import ModelOptions, NeuralReward
from rlr_trainer.rewards.neural.preprocessing import ImagePreprocessor
from rlr_trainer.rewards.neural.weights import load_model, load_pretrained


class ClassifierScore(NeuralReward):
    """What a classifier gives a class, [B]; differentiable where the classifier is.

    Args:
        model: pixels [B, 3, h, w] -> logits [B, K], or an object that has them as `logits`.
        target: number or label of the class; exactly one of `target` and `target_key` is given.
        target_key: the metadata entry with the number or label of each sample's own class; NaN, "does not apply", for samples without.
        output: "probability" (softmax; saturates, and its gradient with it), "log_probability", or "logit".
        labels: label -> number. Default: the model's `config.label2id`, if it has one.
        preprocess: images [B, 3, H, W] in [0, 1] -> pixels; default: none.
        name, options: as `NeuralReward`.

    Raises:
        ValueError: an unknown output or label, or not exactly one of the two targets.
    """

    OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
        "probability": lambda logits: logits.softmax(-1),
        "log_probability": lambda logits: logits.log_softmax(-1),
        "logit": lambda logits: logits,
    }

    def __init__(
        self,
        model: nn.Module,
        target: int | str | None = None,
        *,
        target_key: str | None = None,
        output: str = "probability",
        labels: dict[str, int] | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        name: str = "classifier",
        **options: Unpack[ModelOptions],
    ) -> None:
        if output not in self.OUTPUTS:
            raise ValueError(f"output={output!r}: must be one of {', '.join(self.OUTPUTS)}")
        if (target is None) == (target_key is None):
            raise ValueError(f"target={target!r}, target_key={target_key!r}: give exactly one of them")
        super().__init__(model, preprocess or nn.Identity(), name=name, **options)
        self.output, self.target_key = output, target_key
        self.labels = dict(getattr(getattr(model, "config", None), "label2id", None) or {}) if labels is None else dict(labels)
        self.target = None if target is None else self._number(target)

    def conditions(self, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor | None:
        """Number of each sample's own class, [B]; -1 where there is none."""
        if self.target_key is None:
            return None
        found = [(row or {}).get(self.target_key) for row in metadata]
        numbers = [-1 if target is None else self._number(target) for target in found]
        return torch.tensor(numbers, device=self.parameter.device)

    def score(self, pixels: Tensor, conditions: Tensor | None) -> Tensor:
        """What the classifier gives each picture's class, [B]; NaN for a picture without one (-1 in `conditions`)."""
        returned = self.model(pixels)
        logits = getattr(returned, "logits", returned)
        values = self.OUTPUTS[self.output](logits.to(torch.promote_types(logits.dtype, torch.float32)))
        targets = conditions if conditions is not None else torch.tensor([self.target] * len(values), device=values.device)
        if int(targets.max()) >= values.shape[1]:
            raise ValueError(f"reward {self.__name__!r}: class {int(targets.max())} of a classifier with {values.shape[1]} classes")
        chosen = values.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
        return torch.where(targets < 0, torch.nan, chosen)

    def _number(self, target: int | str) -> int:
        number = self.labels.get(target, -1) if isinstance(target, str) else target
        if number < 0:
            known = ", ".join(list(self.labels)[:10]) or "none"
            raise ValueError(
                f"reward {self.__name__!r}: no class {target!r}; must be a number from 0 or one of the labels: {known}"
            )
        return int(number)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        target: int | str | None = None,
        *,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        name: str = "classifier",
        **options: Any,
    ) -> ClassifierScore:
        """Loads any transformers image classifier, with the steps of its image processor unless `preprocess` is given.

        Args:
            source: folder or hub id.
            target, preprocess, name, options: as the class.

        Raises:
            WeightsError: something is missing or damaged, or the image processor has a step without a counterpart.
        """
        from transformers import AutoModelForImageClassification

        model = load_model(AutoModelForImageClassification, source, name)
        preprocess = preprocess or load_pretrained(ImagePreprocessor, source, name)
        return cls(model, target, preprocess=preprocess, name=name, **options)
