"""The command line: exit codes, messages, files."""

import json
from pathlib import Path

import pytest

from rlr_trainer.cli import main
from rlr_trainer.run_config import load_prompts, load_settings

RUN = """
model: digits
reward: ink
prompts: a handwritten digit
sample_num_steps: 3
sample_guidance_scale: 1.0
per_device_train_batch_size: 2
learning_rate: 1e-3
max_steps: 1
lora_r: 2
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture(autouse=True)
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def test_train_from_a_file_with_overrides(run_file, capsys):
    assert main(["train", "--config", str(run_file), "--output_dir", "out", "--max_steps=2", "--fo-steps", "1"]) == 0
    config = json.loads(Path("out/rlr_config.json").read_text())
    assert config["fo_steps"] == 1
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert Path("out/pytorch_lora_weights.safetensors").is_file()
    assert Path("out/README.md").is_file()
    assert main(["train", "--config", str(run_file), "--output_dir", "out"]) == 1
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fo_step", "1"], "unknown key 'fo_step'; did you mean 'fo_steps'?"),
        (["--reward", "good"], "reward='good': must be ink"),
        (["--reward", "json:nothing"], "module 'json' has no 'nothing'"),
        (["--reward", "no_such_module:f"], "cannot import 'no_such_module'"),
        (["--prompts", "missing.txt"], "no such file"),
        (["--model", "nowhere/at_all"], "cannot be loaded"),
        (["--fo_steps", "9"], "fo_steps=9: K must lie between 0 and the number of steps, 3"),
        (["stray"], "overrides are written"),
    ],
)
def test_errors_are_one_line_without_a_traceback(run_file, capsys, arguments, message):
    assert main(["train", "--config", str(run_file), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_missing_keys_and_files(capsys, tmp_path):
    assert main(["train", "--model", "digits", "--reward", "ink"]) == 1
    assert "key 'prompts' is missing" in capsys.readouterr().err
    assert main(["train", "--config", "nothing.yaml"]) == 1
    assert "nothing.yaml: cannot be read" in capsys.readouterr().err


def test_debug_shows_the_traceback(run_file):
    with pytest.raises(ValueError, match="unknown key"):
        main(["train", "--debug", "--config", str(run_file), "--fo_step", "1"])


def test_values_are_read_as_yaml(run_file):
    settings = load_settings(
        run_file, ["--learning_rate", "3e-4", "--ho_start", "[0, 1]", "--check_reward", "false", "--overwrite"]
    )
    assert settings["learning_rate"] == 3e-4
    assert settings["ho_start"] == [0, 1]
    assert settings["check_reward"] is False
    assert settings["overwrite"] is True


def test_prompt_sources(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    assert load_prompts("prompts.txt") == [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "n": 1}\n{"prompt": "two", "n": 2}\n')
    assert load_prompts("rows.jsonl")[1] == {"prompt": "two", "n": 2}
    (tmp_path / "own_prompts.py").write_text("def draw():\n    return 'three', {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_prompts("own_prompts:draw")() == ("three", {})


def test_demo_writes_its_files(capsys):
    assert main(["demo", "--reward", "ink", "--max_steps", "1", "--output_dir", "out", "--quiet"]) == 0
    summary = json.loads(Path("out/summary.json").read_text())
    keys = {"reward_before", "reward_after", "judge_before", "judge_after", "frechet_before", "frechet_after", "seconds",
            "reward_queries", "peak_memory_mb"}  # fmt: skip
    assert keys <= summary.keys()
    for name in ("metrics.jsonl", "reward.png", "before_after.png", "pytorch_lora_weights.safetensors", "README.md"):
        assert Path("out", name).stat().st_size > 0
    assert "mean reward" in capsys.readouterr().out


def test_demo_refuses_wrong_options(capsys):
    assert main(["demo", "--target", "12", "--output_dir", "out"]) == 1
    assert "target=12: must be a digit from 0 to 9" in capsys.readouterr().err
    assert main(["demo", "--estimator", "ppo", "--output_dir", "out"]) == 1
    assert "estimator='ppo': unknown" in capsys.readouterr().err
    assert main(["demo", "--estimator", "rlr", "--reward", "compressibility", "--output_dir", "out"]) == 1
    assert "estimator='ddpo'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--no-such-option"])
    assert stopped.value.code == 2
