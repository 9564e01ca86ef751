"""Checkpoints in OpenCLIP's layout as transformers CLIP models: the same network under other names.

| OpenCLIP                                                  | transformers                                              |
|-----------------------------------------------------------|-----------------------------------------------------------|
| visual.conv1, visual.class_embedding, ..., visual.proj    | vision_model.embeddings..., visual_projection (transposed) |
| token_embedding, positional_embedding, text_projection    | text_model.embeddings..., text_projection (transposed)     |
| transformer.resblocks.N.attn.in_proj_weight [3 D, D]      | encoder.layers.N.self_attn.{q,k,v}_proj.weight [D, D]      |
| transformer.resblocks.N.{ln_1,ln_2,mlp.c_fc,mlp.c_proj}   | encoder.layers.N.{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2} |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rlr_trainer.rewards.neural.weights import WeightsError

# Channels of an attention head of ViT-H-14. The number of heads is the one thing that the weights do not tell.
VISION_HEAD_WIDTH = 80
TEXT_HEAD_WIDTH = 64

_WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")  # OpenCLIP multiplies from the right
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' own spelling
    "visual.ln_post": "vision_model.post_layernorm",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_BLOCK_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under transformers' names; a key that the layout does not have keeps its name, so that strict loading reports it."""
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        block = _BLOCK.fullmatch(key)
        stem, _, kind = key.rpartition(".")
        if key in _WHOLE:
            converted[_WHOLE[key]] = value.T if key in _TRANSPOSED else value
        elif stem in _NORMS:
            converted[f"{_NORMS[stem]}.{kind}"] = value
        elif block:
            tower = "vision_model" if block[1] else "text_model"
            converted |= _convert_block(f"{tower}.encoder.layers.{block[2]}", block[3], value)
        else:
            converted[key] = value
    return converted


def _convert_block(layer: str, part: str, value: Tensor) -> dict[str, Tensor]:
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.rpartition("_")[2]
        return {f"{layer}.self_attn.{name}_proj.{kind}": third for name, third in zip("qkv", value.chunk(3), strict=True)}
    stem, _, kind = part.rpartition(".")
    return {f"{layer}.{_BLOCK_PARTS.get(stem, stem)}.{kind}": value}


def open_clip_model(state: Mapping[str, Tensor], path: Path, reward: str, *, end_of_text: int) -> Any:
    """A transformers `CLIPModel` of the sizes that the checkpoint's tensors have, not yet loaded.

    Args:
        state: tensors under OpenCLIP's names.
        path, reward: for messages.
        end_of_text: token whose position gives the text's embedding.

    Raises:
        WeightsError: the keys are not OpenCLIP's, or the sizes are those of another architecture than ViT-H-14's family.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        positions = len(state["visual.positional_embedding"])
        vocabulary, text_width = state["token_embedding.weight"].shape
        vision_hidden = len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"])
        text_hidden = len(state["transformer.resblocks.0.mlp.c_fc.bias"])
        embedding = state["text_projection"].shape[1]
        context = len(state["positional_embedding"])
    except KeyError as error:
        raise WeightsError(
            f"reward {reward!r}: {str(path)!r} is no checkpoint in OpenCLIP's layout: it has no {error}; it has {', '.join(list(state)[:5])}"
        ) from error
    grid = round((positions - 1) ** 0.5)
    if grid**2 + 1 != positions or width % VISION_HEAD_WIDTH or text_width % TEXT_HEAD_WIDTH:
        raise WeightsError(
            f"reward {reward!r}: {str(path)!r} has {positions} positions and widths {width} and {text_width}: not a ViT-H-14 (a square "
            f"grid, heads of {VISION_HEAD_WIDTH} and {TEXT_HEAD_WIDTH} channels)"
        )
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": embedding}
    vision = shared | {
        "hidden_size": width,
        "intermediate_size": vision_hidden,
        "num_hidden_layers": _depth(state, "visual."),
        "num_attention_heads": width // VISION_HEAD_WIDTH,
        "image_size": grid * patch,
        "patch_size": patch,
    }
    text = shared | {
        "hidden_size": text_width,
        "intermediate_size": text_hidden,
        "num_hidden_layers": _depth(state, ""),
        "num_attention_heads": text_width // TEXT_HEAD_WIDTH,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "bos_token_id": end_of_text - 1,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=embedding))


def _depth(state: Mapping[str, Tensor], tower: str) -> int:
    return 1 + max(int(block[2]) for block in map(_BLOCK.fullmatch, state) if block and (block[1] or "") == tower)
