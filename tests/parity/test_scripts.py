"""TRL 0.23.1's example scripts, with the trainer's class name changed, and what raises in TRL itself repaired (docs/migrating.md).

TRL's pipeline logs before accelerate is set up, which raises, and its configs have no `output_dir`, which the last line of its scripts
reads.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from programs import environment
from safetensors.torch import load_file

if not hasattr(trl, "DDPOTrainer"):
    pytest.skip("this TRL has no DDPOTrainer: 0.23.1 was the last", allow_module_level=True)

from rlr_trainer import digits

SCRIPTS = Path(__file__).parent / "scripts"
ARGUMENTS = {
    "pretrained_model": digits.WEIGHTS / "pipeline", "num_epochs": 3, "sample_num_steps": 3, "sample_guidance_scale": 2.0,
    "mixed_precision": "no",
    "train_batch_size": 2, "seed": 4, "save_freq": 2,
    "train_learning_rate": 0.01,
}  # fmt: skip


ENDING = "trainer.save_model(training_args.output_dir)"
PIPELINE = "    pipeline = "


def with_our_trainer(name, class_name, ending):
    """The script, importing RLRTrainer in place of TRL's trainer, with another ending."""
    text = (SCRIPTS / name).read_text()
    assert text.count(f"{class_name}(") == text.count(f" {class_name},") == text.count(ENDING) == text.count(PIPELINE) == 1
    text = text.replace(f" {class_name},", "").replace(f"{class_name}(", "RLRTrainer(").replace(ENDING, ending)
    text = text.replace(PIPELINE, f"    accelerate.PartialState()\n{PIPELINE}")
    return text.replace("\nfrom trl import", "\nimport accelerate\nfrom rlr_trainer import RLRTrainer\nfrom trl import", 1)


def run_script(folder, text, arguments, code=0):
    (folder / "script.py").write_text(text)
    command = [sys.executable, "script.py", *(f"--{name}={value}" for name, value in arguments.items())]
    without_gpu = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=without_gpu)
    assert done.returncode == code, done.stderr[-4000:]
    return done


def check_what_is_left(folder, updates, checkpoints, weights_in="save"):
    lines = [json.loads(line) for line in (folder / "save/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, updates + 1))
    assert {line["learning_rate"] for line in lines} == {0.01}
    assert sorted(path.name for path in (folder / "save").glob("checkpoint-*")) == checkpoints
    weights = load_file(folder / weights_in / "pytorch_lora_weights.safetensors")
    assert {min(tensor.shape) for tensor in weights.values()} == {4}  # TRL's rank
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name or "lora.up" in name)
    fresh = digits.load_pipeline()
    fresh.load_lora_weights(str(folder / weights_in), weight_name="pytorch_lora_weights.safetensors")
    return lines


def test_ddpo(tmp_path):
    arguments = ARGUMENTS | {
        "log_with": "tensorboard",
        "sample_batch_size": 4,
        "sample_num_batches_per_epoch": 2,
        "train_gradient_accumulation_steps": 2,
    }
    done = run_script(tmp_path, with_our_trainer("trl_ddpo.py", "DDPOTrainer", "trainer.save_model()"), arguments)
    lines = check_what_is_left(tmp_path, updates=6, checkpoints=["checkpoint-4", "checkpoint-6"])  # two updates an epoch
    assert lines[-1]["reward_queries"] == 3 * 8 + 4  # and one batch to try the reward
    config = json.loads((tmp_path / "save/rlr_config.json").read_text())
    assert config["estimator"] == "ddpo"
    assert config["sample_guidance_scale"] == 2.0
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    assert "no LoRA weights" in done.stderr  # TRL's own warning, which raises without accelerate.PartialState()


def test_alignprop_with_the_ending_that_raises_in_trl(tmp_path):
    """The weights of a finished training are not lost with it: they are in the last checkpoint."""
    arguments = ARGUMENTS | {"log_image_freq": 2, "mixed_precision": "none"}
    done = run_script(tmp_path, with_our_trainer("trl_alignprop.py", "AlignPropTrainer", ENDING), arguments, code=1)
    assert "'AlignPropConfig' object has no attribute 'output_dir'" in done.stderr
    check_what_is_left(tmp_path, 3, ["checkpoint-2", "checkpoint-3"], weights_in="save/checkpoint-3")


def test_trl_is_left_as_it_is():
    """Its pipeline's logger is accelerate's, which raises before accelerate is set up: no import here exchanges it."""
    from trl.models import modeling_sd_base

    assert type(modeling_sd_base.logger).__module__ == "accelerate.logging"
