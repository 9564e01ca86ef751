"""The command line: exit codes, messages, files."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import environment

import rlr_trainer
from rlr_trainer import RLRConfig
from rlr_trainer.cli import main
from rlr_trainer.cli.settings import SettingsError, load_prompts, load_reward, load_settings
from rlr_trainer.cli.train import USUAL_OPTIONS
from rlr_trainer.rewards import RemoteReward

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
    ("arguments", "code", "message"),
    [
        (["--fo_step", "1"], 2, "unknown key 'fo_step'; did you mean 'fo_steps'?"),
        (["stray"], 2, "overrides are written"),
        (["--max_steps", "many"], 2, "max_steps='many': must be a number"),
        (["--max_steps", "1.5"], 2, "max_steps=1.5: must be a whole number"),
        (["--max_steps", "1e-3"], 2, "max_steps=0.001: must be a whole number"),
        (["--max_steps", "null"], 2, "max_steps has no value"),
        (["--max_steps", "0"], 1, "max_steps=0: must be a number of updates, or -1"),
        (["--per_device_train_batch_size", "0"], 1, "per_device_train_batch_size=0: must be a whole number of at least 1"),
        (["--gradient_accumulation_steps", "0"], 1, "gradient_accumulation_steps=0: must be a whole number of at least 1"),
        (["--learning_rate"], 2, "learning_rate=true: must be a number"),
        (["--fo_steps", "true"], 2, "fo_steps=true: must be a number"),
        (["--use_lora", "fasle"], 2, "use_lora='fasle': must be true or false"),
        (["--bf16", "2"], 2, "bf16=2: must be true or false"),
        (["--output_dir", ""], 2, "output_dir='': must be a folder"),
        (["--model", "3"], 2, "model=3: must be digits, a folder or a hub id"),
        (["--prompts", "[a cat"], 2, "--prompts [a cat: cannot be read as YAML"),
        (["--reward", "[]"], 2, "reward=[]: must be a name"),
        (["--reward", "digit:12"], 1, "reward='digit:12': must be ink"),
        (["--reward", "sub/mine.py:f"], 1, "names a file, but must name a module: write mine:f"),
        (["--prompts", "sub/mine.py:f"], 1, "names a file, but must name a module: write mine:f"),
        (["--reward", "3"], 2, "reward=3: must be a name"),
        (["--reward", "good"], 1, "reward='good': must be ink"),
        (["--reward", "json:nothing"], 1, "module 'json' has no 'nothing'"),
        (["--reward", "no_such_module:f"], 1, "cannot import 'no_such_module'"),
        (["--prompts", "missing.txt"], 1, "prompts='missing.txt': does not exist"),
        (["--prompts", "prompts.tx"], 1, "prompts='prompts.tx': does not exist"),
        (["--prompts", "{split: test}"], 1, "no key 'path'"),
        (["--prompts", "{path: a.csv, colum: x}"], 1, "unknown key 'colum'"),
        (["--eval_prompts", "os:getcwd"], 2, "eval_prompts='os:getcwd': is a function"),
        (["--model", "nowhere/at_all"], 1, "cannot be loaded"),
        (["--fo_steps", "9"], 1, "fo_steps=9: K must lie between 0 and the number of steps, 3"),
        (["--resume", "nowhere"], 1, "--resume nowhere: no such folder"),
        (["--resume", "--output_dir", "empty"], 1, "'empty' holds no complete checkpoint"),
    ],
)
def test_errors_are_one_line_without_a_traceback(run_file, capsys, arguments, code, message):
    Path("empty").mkdir()
    assert main(["train", "--config", str(run_file), *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("rlr-trainer train: ")


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        ("RuntimeError('one\\ntwo')", 1, "rlr-trainer train: RuntimeError: one (--debug shows the traceback)\n"),
        ("AssertionError", 1, "rlr-trainer train: AssertionError (--debug shows the traceback)\n"),
        ("__import__('torch').OutOfMemoryError('full')", 1, "OutOfMemoryError: full (lower per_device_train_batch_size"),
        ("ValueError('one\\ntwo')", 1, "rlr-trainer train: one two\n"),
        ("KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_whatever_is_raised_becomes_one_line_and_a_code(run_file, capsys, tmp_path, monkeypatch, raised, code, message):
    name = f"failing_{abs(hash(raised))}"
    (tmp_path / f"{name}.py").write_text(f"raise {raised}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["train", "--config", str(run_file), "--reward", f"{name}:f"]) == code
    assert message in capsys.readouterr().err


def test_missing_keys_and_files(capsys, tmp_path):
    assert main(["train", "--model", "digits", "--reward", "ink"]) == 2
    assert "key 'prompts' is missing" in capsys.readouterr().err
    assert main(["train", "--config", "nothing.yaml"]) == 2
    assert "nothing.yaml: cannot be read" in capsys.readouterr().err


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
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 100
    from transformers import TrainingArguments

    base = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field.name for field in dataclasses.fields(RLRConfig) if field.name not in base]
    assert len(own) > 30
    for name in ["config", "resume", "model", "reward", "prompts", "eval_prompts", *own, *(name for name, _ in USUAL_OPTIONS)]:
        assert f"--{name} " in output, name
    assert "T: denoising steps. (default: 50)" in output
    assert (
        output.index("\nestimator:") < output.index("  --fo_steps") < output.index("\nsampling:") < output.index("  --sample_eta")
    )


def test_resuming(run_file):
    arguments = ["train", "--config", str(run_file), "--output_dir", "out", "--save_steps", "1"]

    def steps():
        rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
        return [row["step"] for row in rows if "loss" in row]

    assert main([*arguments, "--max_steps", "2"]) == 0
    assert main([*arguments, "--max_steps", "3", "--resume"]) == 0
    assert steps()[-1] == 3
    assert steps().count(1) == 1
    assert main([*arguments, "--max_steps", "3", "--resume", "out/checkpoint-1"]) == 0
    assert steps()[-2:] == [2, 3]


@pytest.mark.parametrize(
    ("save_steps", "message"),
    [
        ("2", "interrupted after 3 updates; --resume goes on from checkpoint-2\n"),
        ("9", "interrupted after 3 updates; no checkpoint was saved before (save_steps=9), so nothing can be resumed\n"),
    ],
)
def test_an_interruption_says_what_is_left(run_file, tmp_path, monkeypatch, capsys, save_steps, message):
    name = f"interrupting_{save_steps}"
    (tmp_path / f"{name}.py").write_text(
        "calls = 0\n"
        "def reward(images, prompts, metadata):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 4:\n"
        "        raise KeyboardInterrupt\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--check_reward", "false", "--num_log_images", "0", "--max_steps", "5", "--save_steps", save_steps]
    run = ["train", "--config", str(run_file), "--output_dir", "out", *arguments]
    assert main([*run, "--reward", f"{name}:reward"]) == 130
    assert capsys.readouterr().err.endswith(message)
    assert main([*run, "--reward", "ink", "--resume"]) == (0 if save_steps == "2" else 1)


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
    assert done.stderr.startswith("rlr-trainer report: ended, because what reads its output has ended")
    assert done.stderr.count("\n") == 1


def test_prompts_for_an_evaluation_that_never_comes(run_file, caplog, capsys):
    arguments = ["train", "--config", str(run_file), "--eval_prompts", "a digit"]
    assert main([*arguments, "--output_dir", "one"]) == 0
    assert "nothing is evaluated during training" in caplog.text
    assert "written to one: the trained weights, README.md, metrics.jsonl\n" in capsys.readouterr().out
    caplog.clear()
    assert main([*arguments, "--output_dir", "two", "--eval_strategy", "steps", "--eval_steps", "1"]) == 0
    assert "nothing is evaluated" not in caplog.text
    assert "eval_reward" in Path("two/metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_run_that_sigterm_ends_can_be_resumed(run_file, tmp_path):
    """In a process of its own; the reward says when training is under way."""
    (tmp_path / "slow_reward.py").write_text(
        "import pathlib, time\n"
        "def reward(images, prompts, metadata):\n"
        "    pathlib.Path('began').touch()\n"
        "    time.sleep(0.2)\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    arguments = [
        "train",
        "--config",
        str(run_file),
        "--reward",
        "slow_reward:reward",
        "--output_dir",
        "out",
        "--check_reward",
        "false",
    ]
    command = [sys.executable, "-m", "rlr_trainer.cli", *arguments, "--max_steps", "1000"]
    process = subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not Path("began").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    (checkpoint,) = Path("out").glob("checkpoint-*")
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    assert done < 1000
    assert main([*arguments, "--reward", "ink", "--max_steps", str(done + 1), "--resume"]) == 0
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row][-1] == done + 1


def launch(run_file, *launcher):
    command = [sys.executable, "-m", *launcher, "-m", "rlr_trainer.cli", "train", "--config", str(run_file), "--output_dir", "out"]
    done = subprocess.run(command, cwd=run_file.parent, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path("out/pytorch_lora_weights.safetensors").is_file()
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_through_accelerate_launch(run_file):
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    (row,) = launch(run_file, "accelerate.commands.accelerate_cli", "launch", *options)
    assert row["reward_queries"] == 4  # two of the check, two of the rollout


@pytest.mark.slow
def test_in_two_processes(run_file):
    """`accelerate launch` starts several processes on GPUs only; on the CPU torchrun does."""
    (row,) = launch(run_file, "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    assert row["reward_queries"] == 8


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
    settings = load_settings(
        None,
        [
            "--clip_range",
            "none",
            "--advantage",
            "none",
            "--reward_weights",
            "1,0.5",
            "--lora_target_modules=to_q,to_k",
            "--max_steps=1e3",
        ],
    )
    assert settings == {
        "clip_range": None, "advantage": "none", "reward_weights": [1, 0.5], "lora_target_modules": ["to_q", "to_k"], "max_steps": 1000,
    }  # fmt: skip
    assert isinstance(settings["max_steps"], int)
    RLRConfig(output_dir="x", use_cpu=True, **settings)


@pytest.mark.parametrize(
    "text",
    ["a cat: with a hat", "a cat: b: c", "a cat # 1", "@home", "*star*", '"No" they said', "- a cat", "cat, 2026", "no"],
)
def test_a_prompt_on_the_command_line_stays_as_it_is(text):
    assert load_settings(None, ["--prompts", text, "--negative_prompt", text]) == {"prompts": text, "negative_prompt": text}


def test_texts_that_look_like_something_else():
    overrides = ["--run_name", "2026-01-31", "--output_dir=007", "--hub_model_id", "1e3", "--negative_prompt", ""]
    assert load_settings(None, [*overrides, "--save_strategy", "no", "--ema_decay", "null", "--resume_from_checkpoint"]) == {
        "run_name": "2026-01-31", "output_dir": "007", "hub_model_id": "1e3", "negative_prompt": "", "save_strategy": "no",
        "ema_decay": None, "resume_from_checkpoint": True,
    }  # fmt: skip
    assert load_settings(None, ["--prompts", "'[cat]'", "--reward", "[ink, a:b]"]) == {"prompts": "[cat]", "reward": ["ink", "a:b"]}


def test_values_of_a_file():
    Path("some.yaml").write_text(
        "\ufeffsave_strategy: no\r\nuse_cpu: yes\r\nbf16: off\r\nrun_name: 2026-01-31\r\nreward_weights: [1e-1, 2]\r\n"
        "max_steps: 1e3\r\nnegative_prompt: häßlich\r\nprompts: [yes, no]\r\n",
        encoding="utf-8",
    )
    settings = load_settings("some.yaml")
    assert settings == {
        "save_strategy": "no", "use_cpu": True, "bf16": False, "run_name": "2026-01-31", "reward_weights": [0.1, 2],
        "max_steps": 1000, "negative_prompt": "häßlich", "prompts": ["yes", "no"],
    }  # fmt: skip
    assert load_settings("some.yaml", ["--max_steps", "5"])["max_steps"] == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a", "must hold `key: value` lines"),
        (b"seed: 1\nseed: 2", "the key 'seed' stands twice"),
        (b"prompts: {path: a.csv, path: b.csv}", "the key 'path' stands twice"),
        (b"training:\n  max_steps: 1", "unknown key 'training'; keys are not grouped"),
        (b"run_name: 3", "run_name=3: must be text; write it in quotes"),
        (b"seed:", "seed has no value"),
        (b"negative_prompt: h\xe4\xdflich", "cannot be read: 'utf-8' codec"),
    ],
)
def test_files_that_cannot_be(content, message):
    Path("bad.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        load_settings("bad.yaml")


def test_prompt_sources(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    assert load_prompts("prompts.txt") == [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "n": 1}\n{"prompt": "two", "n": 2}\n')
    assert load_prompts("rows.jsonl")[1] == {"prompt": "two", "n": 2}
    (tmp_path / "words.csv").write_text("caption\none\n")
    assert load_prompts({"path": "words.csv", "column": "caption"})[0] == {"prompt": "one"}
    (tmp_path / "own_prompts.py").write_text("def draw():\n    return 'three', {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_prompts("own_prompts:draw")() == ("three", {})
    assert load_prompts(["one", "two"]) == [{"prompt": "one"}, {"prompt": "two"}]
    for prompt in ("a handwritten digit", "A cat. On a mat.", "black/white photo: a cat", "cat", "a long prompt " * 300):
        assert load_prompts(prompt) == [{"prompt": prompt}]
    for nothing in ("", 3, [], [1]):
        with pytest.raises(ValueError, match="must be a prompt, a list of prompts"):
            load_prompts(nothing)


def test_serve_reward_refuses_what_cannot_be_served(capsys):
    import socket

    assert main(["serve-reward", "good"]) == 1
    assert "reward='good': must be ink" in capsys.readouterr().err
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
        (["--output_dir", "run.yaml"], "--output_dir run.yaml: cannot be made (File exists)"),
        (["--device", "gpu"], "--device gpu: there is no such device"),
        (["--lora", "no/such/folder"], "--lora no/such/folder: no such folder, and as a hub id it cannot be loaded"),
    ],
)
def test_sample_says_what_cannot_be(run_file, capsys, arguments, message):
    assert main(["sample", "--model", "digits", "--prompts", "a long prompt " * 100, "--num_steps", "2", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_url_is_a_reward():
    reward = load_reward("http://127.0.0.1:8123")
    assert isinstance(reward, RemoteReward)
    assert "http://127.0.0.1:8123" in repr(reward)


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
