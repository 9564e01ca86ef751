"""`estimate`, `train --dry_run`, `doctor`, the summary at the start, and the configurations that ship."""

import json
import logging
from pathlib import Path

import pytest
import torch

from rlr_trainer.cli import doctor, main
from rlr_trainer.cli.settings import parse_run
from rlr_trainer.cli.summary import in_units
from rlr_trainer.digits import MODELS
from rlr_trainer.pipelines.skeleton import load_skeleton

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
RUN = """
reward: digit:7
prompts: a handwritten digit
sample_num_steps: 2
sample_guidance_scale: 1.0
per_device_train_batch_size: 2
max_steps: 1
save_strategy: no
num_log_images: 0
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture(autouse=True)
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)


@pytest.mark.medium
def test_an_estimate_needs_no_weights_and_leaves_no_files(capsys):
    model = Path("model")
    model.mkdir()
    for path in MODELS["digits"].glob("pipeline/**/*"):  # the configuration alone, as of a hub id that is not in the cache
        if path.is_file() and path.suffix not in (".safetensors", ".bin"):
            target = model / path.relative_to(MODELS["digits"] / "pipeline")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    tables = []
    for name in ("digits", "model"):
        assert main(["train", "--config", "run.yaml", "--model", name, "--lora_r", "4", "--dry_run"]) == 0
        printed = capsys.readouterr().out
        assert "8 forward and 4 backward passes of the network" in printed
        tables.append(printed.splitlines()[-8:])
    assert tables[0] == tables[1]
    assert logging.getLogger("rlr_trainer").isEnabledFor(logging.WARNING)  # it was quiet for the estimate alone
    assert sorted(path.name for path in Path().iterdir()) == ["model", "run.yaml"]


@pytest.mark.slow
def test_settings_that_fit_are_proposed(capsys):
    arguments = ["estimate", "--config", "run.yaml", "--model", "digits", "--per_device_train_batch_size", "8"]
    assert main([*arguments, "--memory", "0.012"]) == 0
    printed = capsys.readouterr().out
    assert "with these settings it does" in printed
    proposed = printed[printed.index("with these settings") :].splitlines()[1:]
    assert main([*arguments, "--memory", "0.012", *(f"--{line.replace(': ', '=')}" for line in proposed)]) == 0
    assert "fits in 90% of 0.012 GB" in capsys.readouterr().out


def test_a_skeleton_takes_no_memory_and_has_every_weight():
    pipeline = load_skeleton(MODELS["digits"] / "pipeline", torch.bfloat16, torch.float32)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    assert {p.dtype for p in pipeline.text_encoder.parameters()} == {torch.bfloat16}
    assert all(p.untyped_storage().nbytes() <= 4 for p in pipeline.unet.parameters())
    with pytest.raises(ValueError, match=r"model='nowhere': cannot be made of its configuration"):
        load_skeleton("nowhere", torch.float32, torch.float32)


@pytest.mark.medium
def test_a_run_says_what_it_is_and_how_long_it_takes(capsys):
    assert main(["train", "--config", "run.yaml", "--model", "digits", "--reward", "ink", "--output_dir", "out"]) == 0
    printed = capsys.readouterr().out
    update = "update  2 pictures, 8 forward and 4 backward passes"
    for line in ("model   ", "plan    ", update, "trained ", "memory  ", "files   out", "time    first update"):
        assert line in printed


def test_the_doctor_answers_without_a_network(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("rlr_trainer", "torch", "diffusers", "cpu", "cache", "hub"):
        assert f"\n{name} " in f"\n{printed}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "NOT REACHED" in doctor.hub()[1]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert ("missing", "tensorboard, for report_to: tensorboard: pip install 'rlr-trainer[tensorboard]'") in list(doctor.missing())


def test_numbers_in_words():
    assert [in_units(n, "B") for n in (0, 999, 1234, 12_345_678, 2e12)] == ["0 B", "999 B", "1.23 kB", "12.3 MB", "2 TB"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_that_ships_is_valid(path):
    text = path.read_text()
    run, config = parse_run(path, ["--use_cpu", "true"])
    assert text.startswith(f"# rlr-trainer train --config examples/configs/{path.name}\n")
    assert config.plan and run.prompts and config.output_dir == f"runs/{path.stem}"
    json.dumps(config.rlr_options(), default=str)
    assert run.model in MODELS and "# Reached " in text
