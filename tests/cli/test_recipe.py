"""The recipe of docs/migrating.md for TRL's example scripts on a TRL without DDPOTrainer, applied literally to its ddpo.py."""

import argparse
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser
from trl import ModelConfig, ScriptArguments, TrlParser

from rlr_trainer import RLRConfig, digits

SCRIPT = (Path(__file__).parents[1] / "parity/scripts/trl_ddpo.py").read_text()
RECIPE = (
    (
        "from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline\n",
        "from diffusers import DiffusionPipeline\nfrom rlr_trainer import RLRConfig, RLRTrainer\n",
    ),
    ('    use_lora: bool = field(default=True, metadata={"help": "Whether to use LoRA."})\n', ""),
    ("(ScriptArguments, DDPOConfig)", "(ScriptArguments, RLRConfig)"),
    (
        """\
    training_args.project_kwargs = {
        "logging_dir": "./logs",
        "automatic_checkpoint_naming": True,
        "total_limit": 5,
        "project_dir": "./save",
    }
""",
        "",
    ),
    (
        """\
    pipeline = DefaultDDPOStableDiffusionPipeline(
        script_args.pretrained_model,
        pretrained_model_revision=script_args.pretrained_revision,
        use_lora=script_args.use_lora,
    )
""",
        "    pipeline = DiffusionPipeline.from_pretrained(script_args.pretrained_model, revision=script_args.pretrained_revision)\n",
    ),
    ("trainer = DDPOTrainer(", "trainer = RLRTrainer("),
)


def migrated():
    text = SCRIPT
    for old, new in RECIPE:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def run(text, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ddpo.py", *arguments])
    exec(compile(text, "ddpo.py", "exec"), {"__name__": "__main__"})


@pytest.mark.medium
def test_the_migrated_script_trains(tmp_path, monkeypatch):
    options = {
        "pretrained_model": digits.WEIGHTS / "pipeline", "output_dir": tmp_path, "estimator": "ddpo", "max_steps": 1, "use_cpu": True,
        "sample_num_steps": 2, "sample_guidance_scale": 1, "per_device_train_batch_size": 2, "num_log_images": 0,
    }  # fmt: skip
    run(migrated(), monkeypatch, *(f"--{name}={value}" for name, value in options.items()))
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_a_script_s_own_use_lora_is_also_the_config_s(monkeypatch):
    line = RECIPE[1][0]
    kept = migrated().replace("    pretrained_model: str", f"{line}    pretrained_model: str")
    assert line in kept
    with pytest.raises(argparse.ArgumentError, match="conflicting option strings: --use_lora"):
        run(kept, monkeypatch)


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_trl_s_script_arguments_share_no_option_with_the_config_and_its_model_config_does(parser):
    parser((ScriptArguments, RLRConfig))
    with pytest.raises(argparse.ArgumentError, match="conflicting option strings: --lora_r"):
        parser((ModelConfig, RLRConfig))
