"""Checkpoints in OpenCLIP's layout as transformers CLIP models: the same network under other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlr_trainer.rewards.neural.weights import rename


def tower(width: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    """Options of transformers' configuration of a transformer with exact GELU and a hidden layer four times as wide."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "hidden_act": "gelu", **others}


VIT_H_14: dict[str, Any] = {
    "vision_config": tower(1280, layers=32, heads=16, image_size=224, patch_size=14),
    "text_config": tower(1024, layers=24, heads=16, vocab_size=49408, max_position_embeddings=77),
    "projection_dim": 1024,
}

# OpenCLIP's names -> transformers'. attn.in_proj_{weight,bias} [3 D, ...] is split in three besides, see below.
_NAMES = {
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",  # transformers' own spelling
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")  # OpenCLIP multiplies from the right


def convert_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under transformers' names; a key that the layout does not have keeps its name, so that strict loading reports it."""
    converted: dict[str, Tensor] = {}
    for key, value in rename(state, _NAMES).items():
        layer, packed, kind = key.partition(".attn.in_proj_")
        if packed:
            thirds = zip("qkv", value.chunk(3), strict=True)
            converted |= {f"{layer}.self_attn.{name}_proj.{kind}": third for name, third in thirds}
        else:
            converted[key] = value.T if key in _TRANSPOSED else value
    return converted
