"""What every neural reward shares: device, precision, micro-batches, and features of prompts that are computed once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlr_trainer.estimators.chain import without_autocast
from rlr_trainer.rewards.frames import mean_over_frames
from rlr_trainer.rewards.neural.preprocessing import ImagePreprocessor, check_images

logger = logging.getLogger(__name__)

CACHED_PROMPTS = 4096  # of 1,024 float32 numbers each: 16 MB


class PromptCache:
    """Features that `encode` gives (prompts -> [N, D]), once a distinct prompt, without a graph; the `size` last used ones are kept."""

    def __init__(self, encode: Callable[[list[str]], Tensor], size: int = CACHED_PROMPTS) -> None:
        self.encode, self.size = encode, size
        self._kept: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str], device: torch.device | str) -> Tensor:
        """[B, D], one row a prompt, on `device`; rows that were computed on another are brought there."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]:
            with torch.no_grad():
                rows = self.encode(new)
            self._kept |= {prompt: row.clone() for prompt, row in zip(new, rows, strict=True)}  # a view would keep all rows
        self._kept |= {prompt: self._kept.pop(prompt) for prompt in dict.fromkeys(prompts)}  # the last used go last
        features = torch.stack([self._kept[prompt].to(device) for prompt in prompts])
        for prompt in list(self._kept)[: -self.size]:
            del self._kept[prompt]
        return features


class ModelOptions(TypedDict, total=False):
    """Options that every neural reward passes on to `NeuralReward`, which explains them."""

    device: torch.device | str | None
    dtype: torch.dtype | None
    batch_size: int | None
    recompute: bool
    eight_bit: bool


class NeuralReward:
    """A frozen network that scores pictures: callable `(images, prompts, metadata) -> [B]`, differentiable in the images.

    Subclasses give `conditions` (what a sample is scored against) and `score`.

    Args:
        model: the network; it is put into evaluation mode and frozen.
        preprocess: images [B, 3, H, W] in [0, 1] -> pixels of the network.
        name: of the metric `rewards/<name>/mean`.
        device: where the network stays; None: it follows the images.
        dtype: of its parameters; None leaves them. Pixels are prepared, and features compared, in at least float32.
        batch_size: pictures, or frames of videos, per pass of the network; None: all at once.
        recompute: with a graph, keep the activations of one pass alone and compute them again in the backward pass.
        eight_bit: round pictures as the reference does, for an `ImagePreprocessor`, which explains it.

    Raises:
        ValueError: batch_size below 1, or a model without parameters.
        TypeError: eight_bit with another `preprocess`.
    """

    reads_prompts = False
    full_precision: str | None = None  # name of the module that stays at least in float32

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Tensor], Tensor],
        *,
        name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        recompute: bool = False,
        eight_bit: bool = False,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1, or None for all pictures at once")
        if next(model.parameters(), None) is None:
            raise ValueError(f"reward {name!r}: {type(model).__name__} has no parameters; pass a plain function as it is")
        self.model: Any = model.requires_grad_(False).eval()
        if eight_bit and not isinstance(preprocess, ImagePreprocessor):
            raise TypeError(f"eight_bit=True: needs preprocess to be an ImagePreprocessor, not {preprocess!r}; leave eight_bit out")
        self.preprocess = dataclasses.replace(preprocess, eight_bit=True) if eight_bit else preprocess  # type: ignore[type-var]
        self.batch_size, self.recompute = batch_size, recompute
        self.device = None if device is None else torch.device(device)
        self.__name__ = name
        self.model.to(device=self.device)
        if dtype is not None:
            for key, tensor in chain(model.named_parameters(), model.named_buffers()):
                kept = key.split(".")[0] == self.full_precision
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(torch.promote_types(dtype, torch.float32) if kept else dtype)

    def conditions(self, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor | None:
        """What each sample is scored against, [B, ...], or None if pictures alone are scored."""
        return None

    def score(self, pixels: Tensor, conditions: Tensor | None) -> Tensor:
        """Scores [B] of preprocessed pixels [B, 3, h, w]."""
        raise NotImplementedError

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1], each against its own prompt, on the images' device; a graph of theirs is kept.

        Of videos [B, F, 3, H, W] the mean over all frames; see `FrameReward` for some of them.

        Raises:
            ImageRangeError: images of another shape, type or range.
            ValueError: another number of prompts than images.
        """
        if isinstance(images, Tensor) and images.dim() == 5:
            return mean_over_frames(self, images, prompts, metadata)
        check_images(self.__name__, images)
        count = len(prompts or ())
        if count != len(images) and (prompts is not None or self.reads_prompts):
            raise ValueError(f"reward {self.__name__!r}: {count} prompts for {len(images)} images")
        if self.device is None and self.parameter.device != images.device:
            with torch.inference_mode(False):  # parameters made in inference mode could not enter a graph later
                self.model.to(images.device)
        device = self.parameter.device
        with without_autocast(device):
            conditions = self.conditions(prompts, metadata)
            step = self.batch_size or len(images)
            rows = [slice(start, start + step) for start in range(0, len(images), step)]
            scores = [self._pass(images[part].to(device), None if conditions is None else conditions[part]) for part in rows]
        return torch.cat(scores).to(images.device)

    def _pass(self, images: Tensor, conditions: Tensor | None) -> Tensor:
        def scores(images: Tensor) -> Tensor:
            return self.score(self.preprocess(images).to(self.parameter.dtype), conditions)

        if self.recompute and torch.is_grad_enabled() and images.requires_grad:
            return checkpoint(scores, images, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
        return scores(images)

    @property
    def parameter(self) -> Tensor:
        """A parameter of the network, for its device and precision."""
        return next(self.model.parameters())


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int, *, pad_to_length: bool) -> Any:
    """The tokenizer's output [B, L] for prompts, cut at `length` as the references do; a prompt that is cut is named in the log."""
    tokens = tokenizer(
        list(prompts), padding="max_length" if pad_to_length else True, truncation=True, max_length=length, return_tensors="pt"
    )
    for prompt, mask in zip(prompts, tokens["attention_mask"], strict=True):
        if int(mask.sum()) == length and len(tokenizer(prompt, verbose=False)["input_ids"]) > length:
            logger.warning(
                "prompt %.60r... is longer than the %d tokens that the reward model reads: the rest is cut", prompt, length
            )
    return tokens


class ScoreHead(nn.Module):
    """The head of the aesthetic predictor and of ImageReward: five linear layers with nothing but dropout between them; [B, D] -> [B].

    The layers have the numbers of the published files. They stay in float32: in bfloat16, scores around 5 would be multiples of 1/32.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        linear = [nn.Linear(*sizes) for sizes in ((features, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))]
        drop = [nn.Dropout(share) for share in (0.2, 0.2, 0.1)]
        self.layers = nn.Sequential(*chain(*zip(linear, drop, strict=False)), *linear[3:])

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.to(next(self.parameters()).dtype)).squeeze(-1)
