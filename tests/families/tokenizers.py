"""Tokenizers of the real classes, made without a hub: CLIP's and T5's."""

from __future__ import annotations

import string
from importlib.resources import files
from typing import Any

T5_VOCAB_SIZE = 104  # of `t5_tokenizer()`
CLIP_VOCAB_SIZE = 578  # of `clip_tokenizer()`
CLIP_SPECIAL_TOKENS = {
    "bos_token_id": 576,
    "eos_token_id": 577,
    "pad_token_id": 577,
}  # for CLIPTextConfig: it pools at the end token


def clip_tokenizer(max_length: int = 32, **options: Any) -> Any:
    """A `CLIPTokenizer` with the vocabulary of the bundled model: letters, and the words of its prompts.

    Args:
        max_length: tokens of a padded prompt; the text encoder needs as many positions.
        options: for `from_pretrained`, such as `pad_token="!"` of SDXL's second tokenizer.
    """
    from transformers import CLIPTokenizer

    folder = files("rlr_trainer") / "digits" / "weights" / "pipeline" / "tokenizer"
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=max_length, **options)


def t5_tokenizer(max_length: int = 32) -> Any:
    """A `T5Tokenizer` (transformers 5) of printable ASCII characters and a few frequent pieces, so that prompts take several tokens.

    Args:
        max_length: tokens of a padded prompt, where a pipeline asks for the tokenizer's own maximum.
    """
    from transformers import T5Tokenizer

    characters = [(character, -6.0) for character in string.printable.strip()]
    pieces = [(piece, -4.0) for piece in ("▁a", "▁the", "ing", "er", "an", "in")]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    return T5Tokenizer(vocab=[*special, *characters, *pieces], extra_ids=0, model_max_length=max_length)
