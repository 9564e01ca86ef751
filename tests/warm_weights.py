"""LoRA weights for tests of gradients."""

import torch


def warm_lora(pipeline):
    """LoRA weights that do something: with B = 0 half of the gradients are 0, and a wrong one would not show."""
    from peft import LoraConfig

    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipeline
