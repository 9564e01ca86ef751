"""LoRA weights in peft's own format, for families that diffusers has no LoRA loader for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from rlr_trainer.pipelines.lora import read_lora_file, set_lora_state, trained_adapter

PEFT_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the network within a `PeftModel`


def save_peft_lora(module: Any, directory: str | Path) -> None:
    """Writes the trained adapter of `module` and its config to `directory`, for `peft.PeftModel.from_pretrained(module, directory)`."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = trained_adapter(module)
    config = copy.copy(module.peft_config[name])
    config.inference_mode = True  # what `PeftModel.save_pretrained` writes; else loading makes the weights trainable
    state = get_peft_model_state_dict(module, adapter_name=name)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file({PREFIX + key: tensor.contiguous() for key, tensor in state.items()}, folder / PEFT_FILE, metadata={"format": "pt"})


def load_peft_lora(module: Any, directory: str | Path) -> None:
    """Reads them back into the trained adapter; ValueError if the file is missing, damaged or of other targets or another rank."""
    path = Path(directory) / PEFT_FILE
    set_lora_state(module, read_lora_file(path, PREFIX), path)


def add_peft_lora(module: Any, source: str | Path) -> None:
    """Adds a saved adapter (a folder, or a hub id) to `module`, which has none; whatever peft raises if it cannot be read."""
    from peft import PeftConfig, inject_adapter_in_model
    from peft.utils import load_peft_weights

    state = load_peft_weights(str(source), device="cpu")
    inject_adapter_in_model(PeftConfig.from_pretrained(str(source)), module)
    set_lora_state(module, {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}, Path(source) / PEFT_FILE)
