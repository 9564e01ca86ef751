"""The trained network as Trainer sees it, and the frozen ones beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Policy(nn.Module):
    """The trained network. Trainer, DDP and FSDP wrap this module, and every forward pass goes through the wrapper.

    Its `config` is a `PretrainedConfig`, because Trainer's logging callbacks and model cards read one.
    """

    def __init__(self, denoiser: Any, name_or_path: str = "") -> None:
        from transformers import PretrainedConfig

        super().__init__()
        self.denoiser: Any = denoiser
        self.config: Any = PretrainedConfig()
        self.config.name_or_path = name_or_path
        setattr(self.config, "model_type", "rlr-policy")  # noqa: B010  # a class variable there

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The denoiser's output, in float32 so that means and log-densities are formed in full precision."""
        output = self.denoiser(*args, **kwargs, return_dict=False)[0]
        if isinstance(output, list):  # Z-Image's transformer takes and returns a list of samples
            output = torch.stack(output)
        return output.float()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **_: Any) -> None:
        """Called by Trainer: activation checkpointing inside one network call, on top of the recursion over steps."""
        self.denoiser.enable_gradient_checkpointing()

    # transformers 5 renamed it
    activation_checkpointing_enable = gradient_checkpointing_enable

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """name -> parameter, for those that require a gradient."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def cast_frozen(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves `module` to `device` and its frozen weights to `dtype`, except those that its class keeps in float32."""
    keep = getattr(module, "_keep_in_fp32_modules", None) or []
    module.to(device)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not tensor.requires_grad and not any(part in name.split(".") for part in keep):
            tensor.data = tensor.data.to(dtype)
