"""Chat tokenizers of the real classes, made without a hub: Qwen's (Qwen-Image, Z-Image, Flux.2 klein) and Mistral's (Flux.2)."""

from __future__ import annotations

import string
from typing import Any

# The words of Qwen-Image's template: it drops the template's first 34 tokens, so that they have to be words, not letters.
TEMPLATE_WORDS = """ the image by detailing color shape size texture quantity text spatial relationships of objects and background
Describe system user assistant"""

QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set text = message.content | map(attribute='text') | join %}"
    "{% if message.role == 'system' %}{{ '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}"
    "{% elif message.role == 'user' %}{{ '[INST]' + text + '[/INST]' }}{% else %}{{ text + eos_token }}{% endif %}{% endfor %}"
)


def qwen_tokenizer() -> Any:
    """A `Qwen2Tokenizer` of bytes and the words of Qwen-Image's template, with a chat template of Qwen3's shape."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    inside, _, first = TEMPLATE_WORDS.partition("\n")
    words = ["Ġ" + word for word in inside.split()] + first.split()  # Ġ is a space in front of a word
    pairs = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in pairs)])
    return Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=list(pairs),
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        chat_template=QWEN_TEMPLATE,
    )


def mistral_tokenizer() -> Any:
    """A `LlamaTokenizer`, the class of Mistral's, of printable ASCII characters, with a chat template of Mistral 3's shape."""
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁", "\n", *string.printable.strip()]
    return LlamaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        pad_token="<pad>",
        extra_special_tokens=["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]"],
        chat_template=MISTRAL_TEMPLATE,
    )
