"""LoRA adapters on a diffusers network: attach or continue one, save and load it in diffusers' format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import mix_seed

LORA_FILE = "pytorch_lora_weights.safetensors"
# What a loader needs to rebuild the adapter. The whole of peft's config would tie the file to one version of peft.
METADATA_KEYS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias")


def lora_layers(module: Any) -> dict[str, Any]:
    """The layers with LoRA weights, by their names in `module`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def trained_adapter(module: Any) -> str:
    """Name of the one active adapter of `module`; ValueError where several are."""
    names = sorted({name for layer in lora_layers(module).values() for name in layer.active_adapters})
    if len(names) != 1:
        raise ValueError(f"the network has {len(names)} active LoRA adapters ({', '.join(names)}); leave one active: set_adapters")
    return names[0]


def attach_lora(module: Any, lora_config: Any, seed: int) -> bool:
    """Freezes `module` and makes a LoRA adapter trainable, in float32. Returns False if it adds one, True if it continues one.

    An adapter that the module already has is continued with its own rank and targets, and `lora_config` is not used: adding a
    second one beside it would silently drop the earlier fine-tuning. New weights are drawn from `seed`.

    Raises:
        ValueError: a target that is no module of the network.
    """
    from peft import inject_adapter_in_model

    module.requires_grad_(False)
    continued = bool(getattr(module, "peft_config", None))
    if not continued:
        _check_targets(module, lora_config.target_modules)
        with torch.random.fork_rng(devices=[]):  # the weights depend on the run's seed alone, and the caller's generator stays
            torch.default_generator.manual_seed(mix_seed(seed))
            if hasattr(module, "add_adapter"):
                module.add_adapter(lora_config)
            else:  # PixArt's transformer lacks diffusers' mixin
                inject_adapter_in_model(lora_config, module)
    name = trained_adapter(module)
    for parameter_name, parameter in module.named_parameters():
        if "lora_" in parameter_name and f".{name}." in parameter_name:
            parameter.data = parameter.data.to(torch.float32)
            parameter.requires_grad_(True)
    return continued


def _check_targets(module: Any, targets: Any) -> None:
    """peft is content if one of several targets is there."""
    if targets is None or isinstance(
        targets, str
    ):  # peft chooses, or a regular expression, of which peft refuses one without a match
        return
    names = [f".{name}" for name, _ in module.named_modules()]
    missing = sorted(target for target in targets if not any(name.endswith(f".{target}") for name in names))
    if missing:
        linear = sorted({name.rsplit(".", 1)[-1] for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)})
        raise ValueError(
            f"lora_target_modules: {', '.join(missing)} of {', '.join(sorted(targets))} is no module of {type(module).__name__}; leave the "
            f"option out for the family's own targets, or name others; its linear layers end in {', '.join(linear)}"
        )


def save_lora_weights(pipeline_class: Any, module: Any, directory: str | Path, layers: str, file: str = LORA_FILE) -> None:
    """Writes the trained adapter of `module` to `file` in `directory`, with rank and alpha, so that loading restores its strength.

    `layers` is the keyword argument of `pipeline_class.save_lora_weights` that takes the network's layers. A UNet's keys are written
    in diffusers' older form, which every tool reads; a transformer's in peft's, because the conversion mixes the forms of layers
    such as `add_q_proj` and `to_q`, and diffusers drops some of them on loading.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    name = trained_adapter(module)
    state = get_peft_model_state_dict(module, adapter_name=name)
    if layers.startswith("unet"):
        state = convert_state_dict_to_diffusers(state)
    config = module.peft_config[name].to_dict()
    metadata = {key: config[key] for key in METADATA_KEYS if key in config}
    metadata_argument = layers.replace("_layers", "_adapter_metadata")
    pipeline_class.save_lora_weights(str(directory), weight_name=file, **{layers: state, metadata_argument: metadata})


def load_lora_weights(module: Any, directory: str | Path, prefix: str, file: str = LORA_FILE) -> None:
    """Reads them back into the trained adapter; ValueError if the file is missing, damaged or of other targets or another rank."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    path = Path(directory) / file
    state = read_lora_file(path, f"{prefix}.")
    if not any("lora_A" in key for key in state):
        state = convert_unet_state_dict_to_peft(state)
    set_lora_state(module, state, path)


def read_lora_file(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a file by their names without `prefix`; ValueError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"cannot read LoRA weights from {path}: {error}; pass a folder that save_model wrote") from error
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def set_lora_state(module: Any, state: dict[str, Tensor], path: Path) -> None:
    """Puts LoRA weights, by peft's names within `module`, into the trained adapter; ValueError names the file `path` if they do not fit."""
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    name = trained_adapter(module)
    own = get_peft_model_state_dict(module, adapter_name=name)
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    different = sorted(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
    if different:
        first = different[0]
        raise ValueError(
            f"{path} does not fit the adapter being trained: {len(different)} of {len(shapes)} tensors differ, for instance {first} "
            f"({found.get(first, 'missing')} in the file, {shapes.get(first, 'absent')} here); use the lora_r and lora_target_modules of "
            "the run that wrote it"
        )
    set_peft_model_state_dict(module, state, adapter_name=name)
