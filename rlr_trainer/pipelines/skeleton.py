"""A pipeline made of its configuration files alone: the real classes, whose weights have shapes but take no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Parts that training does not use, and pipelines can be made without.
_LEFT_OUT = ("safety_checker", "image_encoder", "feature_extractor")


def load_skeleton(source: str | Path, dtype: torch.dtype, trained_dtype: torch.dtype) -> Any:
    """The pipeline of a folder or a hub id without its weights: of a hub id configuration and tokenizer files alone are downloaded.

    Every weight is one zero, seen as a tensor of its shape. Text encoders return zeros of the right shapes; networks can be run, but what
    they make says nothing.

    Args:
        source: path or hub id.
        dtype: of text encoders and decoder.
        trained_dtype: of the other networks.

    Raises:
        ValueError: no such pipeline, or one that cannot be made of its configuration.
    """
    import diffusers

    try:
        index: dict[str, Any] = dict(diffusers.DiffusionPipeline.load_config(str(source)))
        parts: dict[str, Any] = {}
        for name, value in index.items():
            if name.startswith("_"):
                continue
            is_part = isinstance(value, list | tuple) and len(value) == 2 and (value[0] is None or isinstance(value[0], str))
            parts[name] = _part(str(source), name, value[0], value[1], dtype, trained_dtype) if is_part else value
        if "requires_safety_checker" in parts:
            parts["requires_safety_checker"] = False
        pipeline = getattr(diffusers, index["_class_name"])(**parts)
    except Exception as error:  # the hub client, diffusers and transformers raise kinds of their own
        raise ValueError(
            f"model={str(source)!r}: cannot be made of its configuration ({type(error).__name__}: {' '.join(str(error).split())[:300]}). Give a "
            "folder that pipe.save_pretrained wrote, or a hub id whose configuration files can be read"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _part(source: str, name: str, library: str | None, kind: str | None, dtype: torch.dtype, trained_dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    if library is None or kind is None or name in _LEFT_OUT:
        return None
    cls: Any = getattr(transformers if library == "transformers" else diffusers, kind)
    if issubclass(cls, transformers.PreTrainedModel):
        config = cls.config_class.from_pretrained(source, subfolder=name)
        with torch.device("meta"):
            encoder = cls(config)
        return _returning_zeros(hollow(encoder, dtype))
    if issubclass(cls, diffusers.ModelMixin):
        config = cls.load_config(source, subfolder=name)
        with torch.device("meta"):
            network = cls.from_config(config)
        return hollow(network, dtype if name == "vae" else trained_dtype)
    return cls.from_pretrained(source, subfolder=name)


def hollow(module: Any, dtype: torch.dtype) -> Any:
    """The module, frozen, with weights of `dtype` that take no memory; those that its class keeps in float32 stay so."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or []

    made: dict[int, nn.Parameter] = {}  # weights that two layers share stay shared

    def shape_of(name: str, tensor: Tensor) -> Tensor:
        casts = tensor.is_floating_point() and not any(part in name.split(".") for part in kept)
        return torch.zeros((), dtype=dtype if casts else tensor.dtype).expand(tensor.shape)

    for prefix, part in module.named_modules():
        for name, tensor in list(part.named_parameters(recurse=False)):
            if id(tensor) not in made:
                made[id(tensor)] = nn.Parameter(shape_of(f"{prefix}.{name}", tensor), requires_grad=False)
                made[id(made[id(tensor)])] = made[id(tensor)]
            part.register_parameter(name, made[id(tensor)])
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.device.type == "meta":
                part._buffers[name] = shape_of(f"{prefix}.{name}", buffer)
    return module.eval()


def _returning_zeros(encoder: Any) -> Any:
    """The text encoder with a forward pass that makes its outputs of zeros. It is asked for shapes, not for what it understands."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    config: Any = encoder.config.get_text_config()
    pooled_width = getattr(config, "projection_dim", None) or config.hidden_size
    projects = type(encoder).__name__.endswith("WithProjection")

    def forward(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One zero, seen in the shape of every output that the encoder's own forward pass returns."""
        zero = torch.zeros((), dtype=encoder.dtype)
        states = zero.expand(*input_ids.shape, config.hidden_size)
        layers = (states,) * (config.num_hidden_layers + 1)
        if projects:
            pooled = zero.expand(len(input_ids), pooled_width)
            return CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=states, hidden_states=layers)
        pooled = zero.expand(len(input_ids), config.hidden_size)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled, hidden_states=layers)

    encoder.forward = forward
    return encoder


def returns_zeros(module: nn.Module) -> bool:
    """Whether it is such an encoder: it takes no memory while it works."""
    return "forward" in vars(module)
