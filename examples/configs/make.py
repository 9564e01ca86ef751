"""Writes the configurations in this folder for models of full size, by family and memory: the settings that the estimate says fit.

    python examples/configs/make.py               # all families; minutes on a CPU, no GPU, nothing is downloaded
    python examples/configs/make.py sd15 flux

The networks are made of their published configurations, as shapes without memory (`load_skeleton`). Tokenizers stand in with one token per
letter, and a reward by what docs/pretrained_rewards.md says that it takes. A size that nothing tried fits gets no file.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import transformers
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from rlr_trainer.cli.estimate import trainer_of_shapes
from rlr_trainer.cli.summary import in_units
from rlr_trainer.diagnosis.estimate import SHARE, Estimate, estimates

HERE = Path(__file__).parent
MEMORIES = (12, 24, 48, 80)  # GB, 10^9 bytes
# docs/pretrained_rewards.md, float32: weights and the graph of one picture, in GB
REWARDS = {"aesthetic": (1.2, 0.4), "pickscore": (3.9, 0.5)}
SMALL = 12  # GB, up to which the smaller reward is taken


@dataclasses.dataclass(frozen=True)
class Family:
    """One model of full size.

    Attributes:
        title, hub_id: its names.
        pipeline: class in diffusers.
        parts: name in the pipeline -> (class, what its configuration says beyond the class's defaults).
        options: of the run, the same for every memory.
        frames: how the reward sees videos; None for pictures.
    """

    title: str
    hub_id: str
    pipeline: str
    parts: dict[str, tuple[str, dict[str, Any]]]
    options: dict[str, Any]
    frames: str | None = None


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
QWEN = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
SDXL_UNET = {
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
}  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DECODER = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
DECODER_16 = DECODER | {"latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
TOKENIZER, LONG_TOKENIZER = (
    ("PreTrainedTokenizerFast", {"model_max_length": 77}),
    ("PreTrainedTokenizerFast", {"model_max_length": 512}),
)
FLOW = {"sample_num_steps": 10, "learning_rate": 3e-4, "lora_r": 32, "gradient_checkpointing": True, "offload_text_encoders": True}


def stable_diffusion_35(size: str, layers: int, positions: int, dual: int) -> Family:
    """One of the two sizes; the first `dual` layers have a second attention."""
    transformer = {
        "num_layers": layers, "num_attention_heads": layers, "caption_projection_dim": 64 * layers, "pos_embed_max_size": positions,
        "dual_attention_layers": list(range(dual)), "qk_norm": "rms_norm",
    }  # fmt: skip
    parts = {
        "transformer": ("SD3Transformer2DModel", transformer),
        "vae": ("AutoencoderKL", DECODER_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
        "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        "text_encoder_3": ("T5EncoderModel", T5),
        "tokenizer": TOKENIZER, "tokenizer_2": TOKENIZER, "tokenizer_3": LONG_TOKENIZER,
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    }  # fmt: skip
    options = {"height": 512, "width": 512, "sample_guidance_scale": 4.5} | FLOW
    title, hub_id = f"Stable Diffusion 3.5 {size}, 512 pixels", f"stabilityai/stable-diffusion-3.5-{size}"
    return Family(title, hub_id, "StableDiffusion3Pipeline", parts, options)


FAMILIES = {
    "sd15": Family(
        "Stable Diffusion 1.5, 512 pixels",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "StableDiffusionPipeline",
        {
            "unet": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
            "vae": ("AutoencoderKL", DECODER | {"sample_size": 512}),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "tokenizer": TOKENIZER,
            "scheduler": ("PNDMScheduler", BETAS | {"skip_prk_steps": True, "steps_offset": 1}),
            "safety_checker": ("", {}),
            "feature_extractor": ("", {}),
        },
        {"sample_num_steps": 50, "rest_num_steps": 8, "sample_guidance_scale": 5.0, "learning_rate": 3e-4, "lora_r": 16},
    ),
    "sdxl": Family(
        "SDXL, 1024 pixels",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        {
            "unet": ("UNet2DConditionModel", SDXL_UNET),
            "vae": ("AutoencoderKL", DECODER | {"sample_size": 1024, "scaling_factor": 0.13025}),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
            "tokenizer": TOKENIZER,
            "tokenizer_2": TOKENIZER,
            "scheduler": ("EulerDiscreteScheduler", BETAS | {"timestep_spacing": "leading", "steps_offset": 1}),
        },
        {"sample_num_steps": 20, "rest_num_steps": 4, "sample_guidance_scale": 5.0, "learning_rate": 1e-4, "lora_r": 16},
    ),
    "sd35-medium": stable_diffusion_35("medium", 24, 384, 13),
    "sd35-large": stable_diffusion_35("large", 38, 192, 0),
    "flux": Family(
        "Flux.1 dev, 512 pixels",
        "black-forest-labs/FLUX.1-dev",
        "FluxPipeline",
        {
            "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
            "vae": ("AutoencoderKL", DECODER_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("T5EncoderModel", T5),
            "tokenizer": TOKENIZER,
            "tokenizer_2": LONG_TOKENIZER,
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        },
        {"height": 512, "width": 512, "sample_guidance_scale": 3.5} | FLOW,
    ),
    "qwen-image": Family(
        "Qwen-Image, 512 pixels",
        "Qwen/Qwen-Image",
        "QwenImagePipeline",
        {
            "transformer": ("QwenImageTransformer2DModel", {}),
            "vae": ("AutoencoderKLQwenImage", {}),
            "text_encoder": ("Qwen2_5_VLForConditionalGeneration", {"text_config": QWEN}),
            "tokenizer": LONG_TOKENIZER,
            "scheduler": (
                "FlowMatchEulerDiscreteScheduler",
                {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
            ),
        },
        {"height": 512, "width": 512, "sample_guidance_scale": 4.0} | FLOW,
    ),
    "wan-1.3b": Family(
        "Wan 2.1 1.3B, 33 frames of 416 x 240 pixels",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "WanPipeline",
        {
            "transformer": ("WanTransformer3DModel", {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}),
            "vae": ("AutoencoderKLWan", {}),
            "text_encoder": ("UMT5EncoderModel", T5 | {"vocab_size": 256384}),
            "tokenizer": LONG_TOKENIZER,
            "scheduler": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
        },
        {
            "height": 240, "width": 416, "num_frames": 33, "decode_in_chunks": True, "sample_guidance_scale": 4.5, "sample_num_steps": 20,
            "rest_num_steps": 4, "learning_rate": 1e-4, "lora_r": 32, "gradient_checkpointing": True, "offload_text_encoders": True,
        },
        frames="frames:4:random",
    ),
}  # fmt: skip
EVERYWHERE = {
    "num_images_per_prompt": 4, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "reward_batch_size": 1,
    "max_steps": 200, "save_steps": 20, "save_total_limit": 3, "log_images_steps": 20, "bf16": True,
}  # fmt: skip


def tokenizer(model_max_length: int) -> Any:
    """One token per letter, between <start> and <end>."""
    special = ("<pad>", "<unk>", "<start>", "<end>")
    vocabulary = {token: number for number, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz "])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=model_max_length, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


def write_model(family: Family, folder: Path) -> None:
    """The configuration files of its pipeline, as its hub repository has them."""
    index: dict[str, Any] = {"_class_name": family.pipeline, "_diffusers_version": diffusers.__version__}
    for name, (kind, config) in family.parts.items():
        cls: Any = getattr(diffusers, kind, None) or getattr(transformers, kind, None)
        index[name] = [None, None] if cls is None else ["diffusers" if hasattr(diffusers, kind) else "transformers", kind]
        if name.startswith("tokenizer"):
            tokenizer(**config).save_pretrained(folder / name)
        elif name == "scheduler":
            cls(**config).save_pretrained(folder / name)
        elif cls is not None and issubclass(cls, transformers.PreTrainedModel):
            cls.config_class(**config).save_pretrained(folder / name)
        elif cls is not None:
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps({"_class_name": kind} | config))
    (folder / "model_index.json").write_text(json.dumps(index))


def run_of(family: Family, reward: str, estimator: str) -> dict[str, Any]:
    """The keys of a run's file before a proposal."""
    options = {name: value for name, value in family.options.items() if estimator == "rlr" or name != "rest_num_steps"}
    reward = reward if family.frames is None else f"{family.frames}:{reward}"
    prompts = "ddpo_animals" if family.frames is None else "ddpo_activities"
    head = {"model": family.hub_id, "reward": reward, "prompts": prompts, "output_dir": "runs/", "estimator": estimator}
    return head | options | EVERYWHERE


def of_reward(family: Family, reward: str, estimator: str) -> float:
    """GB that the reward takes: its weights, and the graph of what it scores at a time."""
    weights, graph = REWARDS[reward]
    return weights + (0 if estimator != "rlr" else graph * (1 if family.frames is None else 4))


def settings(family: Family, folder: Path) -> dict[int, tuple[dict[str, Any], Estimate, str]]:
    """Memory -> the run's keys, the estimate, and the reward; only for memories where something fits."""
    found: dict[int, tuple[dict[str, Any], Estimate, str]] = {}
    left: tuple[int, ...] = MEMORIES
    for estimator in ("rlr", "rlr_black_box"):
        if not left:
            break
        run = run_of(family, "jpeg_compressibility", estimator) | {"model": str(folder / "model")}
        if estimator == "rlr":
            run["reward"] = "aesthetic"  # not loaded here, and replaced by a brightness, which has a gradient
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
        trainer, *_ = trainer_of_shapes(str(folder / "run.yaml"), [], str(folder / "out"))
        print(f"{family.title}: {sum(p.numel() for p in trainer.parts.policy.parameters()) / 1e9:.2f} billion weights")
        for largest in ("pickscore", "aesthetic"):
            rewards = {gb: "aesthetic" if gb <= SMALL else largest for gb in left}
            room = {gb: gb - of_reward(family, reward, estimator) / SHARE for gb, reward in rewards.items()}
            left = ()
            for gb, one in zip(room, estimates(trainer, list(room.values()), on_cpu=False), strict=True):
                assert one.proposed is not None
                print(f"  {gb} GB, {estimator}: {in_units(one.proposed.peak, 'B')}, {one.proposal}", flush=True)
                if one.proposal is not None:
                    found[gb] = run_of(family, rewards[gb], estimator) | one.proposal, one, rewards[gb]
                elif sum(one.proposed.parts.values()) < SHARE * gb * 1e9:  # else the weights alone are too many, for any estimator
                    left += (gb,)
    return found


def cell(keys: dict[str, Any], one: Estimate) -> str:
    """Of the table in docs/estimate.md."""
    assert one.proposed is not None
    more = ", checkpointing" if keys.get("gradient_checkpointing") else ""
    return f"`{keys['estimator']}`, {in_units(one.proposed.peak, 'B')}, batch {keys['per_device_train_batch_size']}{more}"


def text_of(family: Family, name: str, gb: int, keys: dict[str, Any], one: Estimate, reward: str) -> str:
    """The file: what the estimate said, and the keys."""
    assert one.proposed is not None
    takes = of_reward(family, reward, keys["estimator"])
    head = [
        f"rlr-trainer train --config examples/configs/{name}.yaml",
        f"{family.title}, for {gb} GB. Not run at full size: what follows is the estimate's, not a measurement.",
        f"At the peak ({one.proposed.largest}) {in_units(one.proposed.peak, 'B')}, and {takes:.1f} GB for {reward}, in {gb} GB.",
        f"Check: rlr-trainer estimate --config examples/configs/{name}.yaml --memory {gb}",
        f"Made by: python examples/configs/make.py {name.removesuffix(f'-{gb}gb')}",
    ]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(keys | {"output_dir": f"runs/{name}"}, sort_keys=False)


def main() -> None:
    transformers.logging.set_verbosity_error()
    for short in sys.argv[1:] or FAMILIES:
        family = FAMILIES[short]
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            model.mkdir()
            write_model(family, model)
            found = settings(family, Path(folder))
        cells = [cell(*found[gb][:2]) if gb in found else "-" for gb in MEMORIES]
        print(f"| `{short}` | {family.title} | {' | '.join(cells)} |")  # a row of the table in docs/estimate.md
        for gb in MEMORIES:
            path = HERE / f"{short}-{gb}gb.yaml"
            path.unlink(missing_ok=True)
            if gb in found:
                path.write_text(text_of(family, path.stem, gb, *found[gb]))


if __name__ == "__main__":
    main()
