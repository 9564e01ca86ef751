"""The command line: exit codes, messages, files."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version
from programs import environment

import rlr_trainer
from rlr_trainer import RLRConfig, digits
from rlr_trainer.cli import demo, main

RUN = """
model: digits
reward: ink
prompts: a handwritten digit
sample_num_steps: 2
sample_guidance_scale: 1.0
per_device_train_batch_size: 2
learning_rate: 1e-3
max_steps: 1
lora_r: 2
num_log_images: 0
use_cpu: true
disable_tqdm: true
"""
TRAIN = ["train", "--config", "run.yaml", "--output_dir", "out"]


@pytest.fixture(autouse=True)
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "EVALUATION_SAMPLES", 64)
    Path("run.yaml").write_text(RUN)


def steps():
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


def test_a_run_is_trained_refused_and_resumed(capsys):
    arguments = [*TRAIN, "--save_steps", "1"]
    assert main([*arguments, "--max_steps=2", "--fo-steps", "1"]) == 0
    assert "written to out: the trained weights, README.md, run.yaml, metrics.jsonl\n" in capsys.readouterr().out
    assert json.loads(Path("out/rlr_config.json").read_text())["fo_steps"] == 1
    assert steps() == [1, 2]
    assert Path("out/pytorch_lora_weights.safetensors").is_file()
    assert main(TRAIN) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--max_steps", "3", "--resume"]) == 0
    assert steps() == [1, 2, 3]
    assert main([*arguments, "--max_steps", "2", "--resume", "out/checkpoint-1"]) == 0
    assert steps() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--fo_step", "1"], 2, "unknown key 'fo_step'; did you mean 'fo_steps'?"),
        (["--config", "nothing.yaml"], 2, "nothing.yaml: cannot be read"),
        (["--eval_prompts", "os:getcwd"], 2, "--eval_prompts os:getcwd: is a function"),
        (["--max_steps", "0"], 1, "--max_steps 0: must be a number of updates, or -1"),
        (["--fo_steps", "9"], 1, "--fo_steps 9: K must lie between 0 and the number of steps, 2"),
        (["--reward", "good"], 1, "--reward good: must be ink"),
        (["--model", "nowhere/at_all"], 1, "cannot be loaded"),
        (["--resume", "nowhere"], 1, "--resume nowhere: no such folder"),
        (["--resume", "--output_dir", "empty"], 1, "'empty' holds no complete checkpoint"),
    ],
)
def test_errors_are_one_line_without_a_traceback(capsys, arguments, code, message):
    Path("empty").mkdir()
    assert main([*TRAIN, *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("rlr-trainer train: ")


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="unknown key"):
        main([*TRAIN, "--debug", "--fo_step", "1"])


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        ("RuntimeError('one\\ntwo')", 1, "rlr-trainer train: RuntimeError: one (--debug shows the traceback)\n"),
        ("AssertionError", 1, "rlr-trainer train: AssertionError (--debug shows the traceback)\n"),
        ("__import__('torch').OutOfMemoryError('full')", 1, "OutOfMemoryError: full (lower per_device_train_batch_size"),
        ("ValueError('one\\ntwo')", 1, "rlr-trainer train: one two\n"),
    ],
)
def test_whatever_is_raised_becomes_one_line_and_a_code(capsys, raised, code, message):
    name = f"failing_{abs(hash(raised))}"
    Path(f"{name}.py").write_text(f"raise {raised}\n")
    assert main([*TRAIN, "--reward", f"{name}:f"]) == code
    assert message in capsys.readouterr().err


def test_version_and_usage(capsys):
    for arguments, code in ((["--version"], 0), (["--help"], 0), ([], 2), (["trian"], 2), (["train", "--config"], 2)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == code
        output = capsys.readouterr()
        if arguments == ["--version"]:
            assert output.out == f"rlr-trainer {rlr_trainer.__version__}\n"
        if arguments == ["--help"]:
            for command in ("train", "demo", "sample", "diagnose", "report", "serve-reward"):
                assert command in output.out
            assert "130 interrupted" in output.out


def test_help_of_train_has_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["train", "--help"]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 100
    options = {field.name for field in dataclasses.fields(RLRConfig) if field.init}
    expected = {f"--{name}" for name in {"config", "resume", "model", "reward", "prompts", "eval_prompts", *options}}
    assert expected <= set(output.replace("]", " ").replace("[", " ").split())
    assert "T: denoising steps. (default: 50)" in output


@pytest.mark.medium
def test_an_interrupted_run_names_the_checkpoint_to_go_on_from(capsys):
    Path("interrupting.py").write_text(
        "calls = []\n"
        "def reward(images, prompts, metadata):\n"
        "    calls.append(1)\n"
        "    if len(calls) in (1, 4):\n"
        "        raise KeyboardInterrupt\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    arguments = [*TRAIN, "--check_reward", "false", "--reward", "interrupting:reward", "--overwrite", "--max_steps", "9"]
    assert main(arguments) == 130
    assert capsys.readouterr().err.endswith("interrupted after 0 updates; no checkpoint was saved\n")
    assert main([*arguments, "--save_steps", "1", "--reward", "interrupting:reward"]) == 130
    assert capsys.readouterr().err.endswith("interrupted after 2 updates; --resume goes on from checkpoint-2\n")
    assert not list(Path("out").glob("*.safetensors"))


@pytest.mark.medium
def test_an_error_names_the_checkpoint_to_go_on_from_and_a_failure_leaves_no_folder(capsys):
    Path("breaking.py").write_text(
        "calls = []\n"
        "def reward(images, prompts, metadata):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 2:\n"
        "        raise ValueError('no more')\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    assert main([*TRAIN, "--reward", "breaking:reward", "--max_steps", "4"]) == 1  # saves after every update
    assert capsys.readouterr().err.endswith("ended after 1 updates. The run can go on from checkpoint-1: --resume.\n")
    assert main([*TRAIN, "--output_dir", "deep/er", "--reward_weights", "1", "2"]) == 1
    assert "--reward_weights 1.0 2.0: must be 1 finite numbers" in capsys.readouterr().err
    assert main(["sample", "--model", "digits", "--prompts", "a", "--lora", "no/such", "--output_dir", "deep/er", "--use_cpu"]) == 1
    assert not Path("deep").exists()


@pytest.mark.medium
def test_a_resumed_run_is_told_of_other_rewards_and_prompts(caplog):
    assert main([*TRAIN, "--save_steps", "1"]) == 0
    run = json.loads(Path("out/run.json").read_text())
    assert run["arguments"]["reward"] == ["ink"] and run["prompts"]["first"] == ["a handwritten digit"] and run["model"] == "digits"
    assert (
        main(["train", "--config", "out/run.yaml", "--max_steps", "2", "--resume", "--reward", "digit:7", "--prompts", "a seven"])
        == 0
    )
    assert "reward_function='ink' -> 'digit:7'" in caplog.text and "prompts=" in caplog.text
    changed = json.loads(Path("out/run.json").read_text())["resumed"][0]["changed"]
    assert {"rewards", "reward_functions", "prompts", "max_steps"} <= changed.keys()
    card = Path("out/README.md").read_text()
    assert 'digits.load_pipeline("digits")' in card and "pypi.org" not in card and str(Path.cwd()) not in card


@pytest.mark.medium
def test_a_run_that_sigterm_ends_can_be_resumed():
    Path("ending.py").write_text(
        "import os, signal\n"
        "def reward(images, prompts, metadata):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        main([*TRAIN, "--check_reward", "false", "--reward", "ending:reward", "--max_steps", "9"])
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert main([*TRAIN, "--max_steps", "2", "--resume"]) == 0
    assert steps() == [1, 2]


def test_prompts_for_an_evaluation_that_never_comes(caplog, monkeypatch):
    from rlr_trainer import RLRTrainer

    monkeypatch.setattr(RLRTrainer, "train", lambda self, **options: None)
    monkeypatch.setattr(RLRTrainer, "save_pretrained", lambda self, folder: None)
    arguments = [*TRAIN, "--eval_prompts", "a digit"]
    assert main([*arguments, "--eval_strategy", "steps", "--eval_steps", "1"]) == 0
    assert "training evaluates nothing" not in caplog.text
    assert main(arguments) == 0
    assert "training evaluates nothing" in caplog.text


@pytest.mark.medium
def test_a_reader_that_goes_ends_the_command_without_noise(tmp_path):
    """`| head`: one line on the standard error, and none of the interpreter's own at its end."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "rlr_trainer.cli", "report", str(tmp_path)]
    buffered = environment() | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, env=buffered, timeout=100)
    os.close(writes)
    assert done.returncode == 1
    assert done.stderr.startswith("rlr-trainer report: [Errno 32] Broken pipe")
    assert done.stderr.count("\n") == 1


@pytest.mark.medium
def test_through_accelerate_launch(tmp_path):
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "rlr_trainer.cli"]
    done = subprocess.run([*launch, *TRAIN], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps() == [1]


def test_serve_reward_refuses_what_cannot_be_served(capsys):
    import socket

    assert main(["serve-reward", "good"]) == 1
    assert "--reward good: must be ink" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve-reward", "jpeg_compressibility", "--port", port]) == 1
    assert f"port {port}: Address already in use; choose another port" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["serve-reward", "jpeg_compressibility", "--prt", "1"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "run.yaml"], "File exists: 'run.yaml'"),
        (["--lora", "no/such/folder"], "--lora='no/such/folder': no such folder; give a folder that exists, or a hub id"),
        (["--num_images", "0"], "--num_images 0: must be at least 1"),
    ],
)
def test_sample_says_what_cannot_be(capsys, arguments, message):
    assert main(["sample", "--model", "digits", "--prompts", "a digit", "--use_cpu", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("model", digits.MODELS)
@pytest.mark.medium
def test_demo_writes_its_files(capsys, model):
    if model == "moving-digits" and Version(version("diffusers")) < Version("0.36"):
        pytest.importorskip("ftfy")
    assert main(["demo", "--model", model, "--reward", "ink", "--max_steps", "1", "--output_dir", "out", "--quiet"]) == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["model"] == model
    own = "motion" if model == "moving-digits" else "frechet"
    keys = {"reward_before", "reward_after", "judge_before", "judge_after", f"{own}_before", f"{own}_after", "seconds",
            "reward_queries", "peak_memory_mb"}  # fmt: skip
    assert keys <= summary.keys()
    for name in ("metrics.jsonl", "reward.png", "before_after.png", "pytorch_lora_weights.safetensors", "README.md"):
        assert Path("out", name).stat().st_size > 0
    assert "mean reward" in capsys.readouterr().out


@pytest.mark.slow
def test_demo_of_the_flow_model_takes_a_black_box(capsys):
    arguments = ["--model", "digits-flow", "--reward", "compressibility", "--max_steps", "1", "--output_dir", "out", "--quiet"]
    assert main(["demo", *arguments]) == 0
    config = json.loads(Path("out/rlr_config.json").read_text())
    assert config["estimator"] == "rlr_black_box"


@pytest.mark.slow
def test_demo_of_the_flow_model_trains_by_ddpo(capsys):
    """Its last step adds no noise, which the preset does not take as it is."""
    arguments = ["--model", "digits-flow", "--estimator", "ddpo", "--max_steps", "1", "--output_dir", "out", "--quiet"]
    assert main(["demo", *arguments]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_steps", "0"], "--max_steps 0: must be"),
        (["--estimator", "ppo"], "--estimator ppo: unknown"),
        (["--estimator", "rlr", "--reward", "compressibility"], "--estimator rlr_black_box"),
        (["--output_dir", "taken"], "--output_dir taken holds another run (metrics.jsonl)"),
    ],
)
def test_demo_refuses_before_it_draws_a_picture(capsys, monkeypatch, arguments, message):
    monkeypatch.delattr(demo.RLRTrainer, "generate")
    Path("taken").mkdir()
    Path("taken/metrics.jsonl").write_text("a run\n")
    assert main(["demo", "--output_dir", "out", *arguments]) == 1
    assert message in capsys.readouterr().err
