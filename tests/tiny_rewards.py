"""Folders with tiny reward models of the real classes, laid out as the published ones are, and real pictures to score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlr_trainer import digits
from rlr_trainer.rewards.neural.base import ScoreHead

TOKENIZER = Path(digits.__file__).parent / "weights" / "pipeline" / "tokenizer"
PROMPTS = ("a handwritten digit", "seven", "a nine")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "hand", "##written", "digit", "seven", "nine")


def photographs() -> list[Image.Image]:
    """Two real pictures of 640 x 427 pixels, and a part of one that stands upright."""
    from sklearn.datasets import load_sample_images

    china, flower = (Image.fromarray(picture) for picture in load_sample_images().images)
    return [china, flower, china.crop((201, 20, 461, 421))]


def squares(size: int = 64) -> Tensor:
    """Three real pictures, [3, 3, size, size] in [0.2, 0.8], where nothing is clipped."""
    arrays = [np.asarray(picture.resize((size, size)), dtype=np.float32) for picture in photographs()]
    return 0.2 + 0.6 * torch.from_numpy(np.stack(arrays) / 255).permute(0, 3, 1, 2)


def to_tensor(picture: Image.Image) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def randomize(tensors, seed: int) -> None:
    """Weights of a size at which every part of the network matters, other than those of an initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point() or name == "logit_scale":
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        is_scale = tensor.ndim == 1 and name.endswith("weight")  # of a layer norm
        tensor.data.copy_(1 + 0.2 * noise if is_scale else noise * (0.2 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5))


def clip_config(**text):
    from transformers import CLIPConfig

    words = tokenizer()
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    return CLIPConfig(
        vision_config=shared | {"image_size": 28, "patch_size": 7},
        text_config=shared | special | {"vocab_size": len(words), "max_position_embeddings": 16} | text,
        projection_dim=24,
    )


def clip_folder(folder: Path, *, parts: bool = True, **text) -> Path:
    """A transformers CLIP model, with its tokenizer and image processor unless `parts` is False."""
    from transformers import CLIPModel

    model = CLIPModel(clip_config(**text))
    randomize(model.state_dict(), seed=1)
    model.save_pretrained(folder)
    if parts:
        clip_parts(folder)
    return folder


def clip_parts(folder: Path) -> Path:
    """Tokenizer and image processor of CLIP alone."""
    tokenizer().save_pretrained(folder)
    processor = {
        "crop_size": {"height": 28, "width": 28},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 28},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def aesthetic_folder(folder: Path) -> Path:
    """The head as LAION publishes it, and the CLIP model in a folder beside it."""
    clip_folder(folder / "clip")
    head = ScoreHead(24)
    randomize(head.state_dict(), seed=2)
    torch.save(head.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


def open_clip_config():
    """Sizes of `open_clip_state`, with the heads of a ViT-H-14: 80 and 64 channels."""
    vision = {"hidden_size": 160, "intermediate_size": 640, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    text = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "vocab_size": len(tokenizer())}
    text["max_position_embeddings"] = 16
    shared = {"hidden_act": "gelu", "num_hidden_layers": 2}
    return {"vision_config": vision | shared, "text_config": text | shared, "projection_dim": 24}


def open_clip_state(width=160, text_width=128, layers=2, text_layers=2, embedding=24, patch=7, grid=4, vocabulary=None, context=16):
    """Names and shapes of a ViT-H-14 state dict of OpenCLIP (`hpsv2/src/open_clip/transformer.py`); the sizes are small."""
    vocabulary = len(tokenizer()) if vocabulary is None else vocabulary
    shapes = {
        "positional_embedding": (context, text_width),
        "text_projection": (text_width, embedding),
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, text_width),
        "ln_final.weight": (text_width,),
        "ln_final.bias": (text_width,),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (grid**2 + 1, width),
        "visual.proj": (width, embedding),
        "visual.conv1.weight": (width, 3, patch, patch),
    }
    for norm in ("visual.ln_pre", "visual.ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower, size, depth in (("visual.", width, layers), ("", text_width, text_layers)):
        for number in range(depth):
            block = f"{tower}transformer.resblocks.{number}"
            for part, shape in {
                "ln_1.weight": (size,),
                "ln_1.bias": (size,),
                "attn.in_proj_weight": (3 * size, size),
                "attn.in_proj_bias": (3 * size,),
                "attn.out_proj.weight": (size, size),
                "attn.out_proj.bias": (size,),
                "ln_2.weight": (size,),
                "ln_2.bias": (size,),
                "mlp.c_fc.weight": (4 * size, size),
                "mlp.c_fc.bias": (4 * size,),
                "mlp.c_proj.weight": (size, 4 * size),
                "mlp.c_proj.bias": (size,),
            }.items():
                shapes[f"{block}.{part}"] = shape
    return shapes


def random_state(shapes, seed: int):
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    randomize(state, seed)
    return state


def hpsv2_folder(folder: Path, filename: str = "HPS_v2.1_compressed.pt", seed: int = 3) -> Path:
    """A checkpoint `{"state_dict": ...}` in OpenCLIP's layout and half precision, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half() for name, tensor in random_state(open_clip_state(), seed).items()}
    torch.save({"epoch": 1, "name": "hpsv2", "state_dict": state}, folder / filename)
    tokenizer().save_pretrained(folder)
    return folder


MED = {
    "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "max_position_embeddings": 40, "pad_token_id": 0, "vocab_size": len(WORDS) + 2,
}  # fmt: skip
BLIP_VISION = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip


def image_reward_shapes(med=MED, width=128, layers=2, patch=8, grid=4, heads=(1024, 128, 64, 16, 1)):
    """Names and shapes of ImageReward.pt (`ImageReward/models/BLIP/{vit,med}.py`, `ImageReward.py`); the sizes are small."""
    size, inner = med["hidden_size"], med["intermediate_size"]
    vision = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid**2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for number in range(layers):
        for part, (rows, columns) in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}.items():
            vision[f"blocks.{number}.{part}.weight"] = (rows * width, columns * width)
            vision[f"blocks.{number}.{part}.bias"] = (rows * width,)
        for norm in ("norm1", "norm2"):
            vision |= {f"blocks.{number}.{norm}.weight": (width,), f"blocks.{number}.{norm}.bias": (width,)}
    text = {
        "embeddings.word_embeddings.weight": (med["vocab_size"], size),
        "embeddings.position_embeddings.weight": (med["max_position_embeddings"], size),
        "embeddings.LayerNorm.weight": (size,),
        "embeddings.LayerNorm.bias": (size,),
    }
    for number in range(med["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for attention, source in (("attention", size), ("crossattention", width)):
            for name, columns in (("self.query", size), ("self.key", source), ("self.value", source), ("output.dense", size)):
                text |= {f"{layer}.{attention}.{name}.weight": (size, columns), f"{layer}.{attention}.{name}.bias": (size,)}
            text |= {f"{layer}.{attention}.output.LayerNorm.{kind}": (size,) for kind in ("weight", "bias")}
        text |= {f"{layer}.intermediate.dense.weight": (inner, size), f"{layer}.intermediate.dense.bias": (inner,)}
        text |= {f"{layer}.output.dense.weight": (size, inner), f"{layer}.output.dense.bias": (size,)}
        text |= {f"{layer}.output.LayerNorm.{kind}": (size,) for kind in ("weight", "bias")}
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in vision.items()}
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    for name, inputs in (("vision_proj", width), ("text_proj", size)):
        shapes |= {f"blip.{name}.weight": (256, inputs), f"blip.{name}.bias": (256,)}
    for number, (inputs, outputs) in zip((0, 2, 4, 6, 7), zip((size, *heads[:-1]), heads, strict=True), strict=True):
        shapes |= {f"mlp.layers.{number}.weight": (outputs, inputs), f"mlp.layers.{number}.bias": (outputs,)}
    return shapes


def image_reward_folder(folder: Path) -> Path:
    """ImageReward.pt (flat keys) and BERT's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    state = random_state(image_reward_shapes(), seed=4)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(MED["max_position_embeddings"])[None]
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def classifier_folder(folder: Path) -> Path:
    """A ViT classifier of three named classes with ViT's image processor."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        id2label={0: "cat", 1: "dog", 2: "owl"},
        label2id={"cat": 0, "dog": 1, "owl": 2},
    )
    model = ViTForImageClassification(config)
    randomize(model.state_dict(), seed=5)
    model.save_pretrained(folder)
    processor = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": {"height": 28, "width": 28},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
