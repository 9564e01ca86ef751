"""Gemma's tokenizer of the real class, made without a hub."""

from __future__ import annotations

import string
from typing import Any

SPACE = "▁"  # what the tokenizer makes of a space


def gemma_tokenizer(text: str = "") -> Any:
    """A `GemmaTokenizer` (transformers 5) of printable ASCII characters and of the words of `text`; `len` of it is its vocabulary's size.

    Args:
        text: its words become tokens, each with the space before it. Without one every character is a token.
    """
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", SPACE, *string.printable.strip(), "\n"]
    merges = []
    for word in dict.fromkeys(text.split()):
        for length in range(1, len(word) + 1):
            pieces.append(SPACE + word[:length])
            merges.append((SPACE + word[: length - 1], word[length - 1]))
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return GemmaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), add_bos_token=True)
