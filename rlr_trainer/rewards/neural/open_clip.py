"""Checkpoints in OpenCLIP's layout as transformers CLIP models: the same network under other names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rlr_trainer.rewards.neural.weights import WeightsError, rename

# Channels of an attention head of ViT-H-14. The number of heads is the one thing that the weights do not tell.
VISION_HEAD_WIDTH = 80
TEXT_HEAD_WIDTH = 64

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


def open_clip_model(state: Mapping[str, Tensor], path: Path, reward: str, *, end_of_text: int) -> Any:
    """A transformers `CLIPModel` of the sizes that the checkpoint's tensors have, not yet loaded.

    Args:
        state: tensors under OpenCLIP's names.
        path, reward: for messages.
        end_of_text: token whose position gives the text's embedding.

    Raises:
        WeightsError: the keys are not OpenCLIP's, or the widths are those of another architecture than ViT-H-14's family.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        vision = _tower(state, "visual.transformer.", VISION_HEAD_WIDTH)
        text = _tower(state, "transformer.", TEXT_HEAD_WIDTH)
        patch = state["visual.conv1.weight"].shape[-1]
        grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        vision |= {"image_size": grid * patch, "patch_size": patch}
        text |= {"vocab_size": len(state["token_embedding.weight"]), "max_position_embeddings": len(state["positional_embedding"])}
        embedding = state["text_projection"].shape[1]
    except KeyError as error:
        raise WeightsError(
            f"reward {reward!r}: {str(path)!r} is no checkpoint in OpenCLIP's layout: it has no {error}; it has {', '.join(list(state)[:5])}"
        ) from error
    if vision["hidden_size"] % VISION_HEAD_WIDTH or text["hidden_size"] % TEXT_HEAD_WIDTH:
        raise WeightsError(
            f"reward {reward!r}: {str(path)!r} has the widths {vision['hidden_size']} and {text['hidden_size']}: not a ViT-H-14 (heads of "
            f"{VISION_HEAD_WIDTH} and {TEXT_HEAD_WIDTH} channels)"
        )
    text |= {"bos_token_id": end_of_text - 1, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=embedding))


def _tower(state: Mapping[str, Tensor], prefix: str, head_width: int) -> dict[str, Any]:
    hidden, width = state[f"{prefix}resblocks.0.mlp.c_fc.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": sum(key.startswith(prefix) and key.endswith(".ln_1.weight") for key in state),
        "num_attention_heads": width // head_width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }
