"""N updates = k updates, an end of any kind, resume, N - k updates: bit for bit."""

import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from rlr_trainer import RewardError, checkpoints, digits
from rlr_trainer.checkpoints import CheckpointError

TIMED = ("time/", "train_", "seconds")
PRESETS = ("rlr", "rlr_paper", "ddpo", "draft", "alignprop", "full_bp", "sqdf", "es")


@pytest.fixture(autouse=True)
def _in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def state_of(trainer):
    """Everything that must not depend on the interruption."""
    weights = {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}
    state = {"weights": weights, "optimizer": trainer.optimizer.state_dict(), "schedule": trainer.lr_scheduler.state_dict()}
    for name in ("starts", "control_scale", "statistics"):
        part = getattr(trainer, name)
        state[name] = None if part is None else part.state_dict()
    state["prompts"] = trainer.prompts.state_dict()
    if trainer.average is not None:
        with trainer.averaged_weights():
            state["average"] = {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}
    return state


def assert_same(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def logged(folder):
    """Lines of metrics.jsonl without what a clock measured."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows if "loss" in row]


def options_of(preset):
    options = {"estimator": preset, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    if preset in ("rlr_paper", "es"):
        options["zo_num_perturbations"] = 2
    return options


def check_resume(make_trainer, pipeline, options, at=2, **arguments):
    def make(folder):
        return make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir=folder, **options, **arguments)

    whole = make("whole")
    whole.train()
    shutil.copytree(f"whole/checkpoint-{at}", f"resumed/checkpoint-{at}")
    shutil.copy("whole/metrics.jsonl", "resumed/metrics.jsonl")  # holds lines past the checkpoint, which must go
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == options["max_steps"]
    assert_same(state_of(whole), state_of(resumed))
    assert logged("resumed") == logged("whole")
    assert len(logged("whole")) == options["max_steps"] // options.get("logging_steps", 1)


ROWS = [{"prompt": digits.class_prompt(d), "wanted": d} for d in range(6)]  # six prompts, batches of four: the order wraps


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(make_trainer, pipeline, preset):
    check_resume(make_trainer, pipeline, options_of(preset), train_dataset=ROWS)


@pytest.mark.parametrize(
    "preset", [preset if preset in ("rlr", "rlr_paper") else pytest.param(preset, marks=pytest.mark.slow) for preset in PRESETS]
)
def test_whole_network(make_trainer, pipeline, preset):
    check_resume(make_trainer, pipeline, options_of(preset) | {"use_lora": False}, train_dataset=ROWS)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "rlr", "ho_start": "grad_norm", "fo_steps": 1, "ho_length": 2, "control_variate": True},
        {"estimator": "ddpo", "advantage": "per_prompt", "per_prompt_min_count": 2},
        {"estimator": "rlr", "ema_decay": 0.9},
        {"estimator": "rlr", "ema_decay": 0.9, "use_lora": False},
        {"estimator": "rlr", "gradient_accumulation_steps": 2, "logging_steps": 4},  # a log line that spans the checkpoint
        {"estimator": "ddpo", "offload_rollouts": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_state_beside_weights(make_trainer, pipeline, options):
    check_resume(make_trainer, pipeline, options_of(options["estimator"]) | options, train_dataset=ROWS)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "ddpo", "num_inner_epochs": 3, "kl_coef": 0.1},
        {"estimator": "rlr", "sample_num_batches_per_epoch": 3, "per_device_train_batch_size": 2, "sample_batch_size": 4},
        {"estimator": "rlr", "control_variate": True, "num_inner_epochs": 3, "offload_rollouts": True},
    ],
    ids=["inner-epochs", "several-batches", "reward-called-in-the-sweep"],
)
def test_in_the_middle_of_a_rollout(make_trainer, pipeline, options):
    check_resume(make_trainer, pipeline, options_of("ddpo") | options | {"max_steps": 6}, at=4, train_dataset=ROWS)


def draw_prompt():
    """Uses all three global generators."""
    choice = (random.randrange(10) + np.random.randint(10) + int(torch.randint(10, ()))) % 10
    return digits.class_prompt(choice), {"choice": choice}


@pytest.mark.parametrize("preset", ["rlr", "ddpo", "es"])
def test_prompt_function_with_global_generators(make_trainer, pipeline, preset):
    seen = []

    def reward(images, prompts, metadata):
        seen.append(prompts)
        return images.mean((1, 2, 3))

    check_resume(
        make_trainer, pipeline, options_of(preset) | {"check_reward": False}, prompt_function=draw_prompt, reward_function=reward
    )
    calls = len(seen) // 3  # of the resumed half
    assert seen[2 * calls :] == seen[calls : 2 * calls]
    assert len({prompt for batch in seen for prompt in batch}) > 2


# ---- incomplete checkpoints, faults of the disk, signals ----


def test_an_incomplete_checkpoint_is_passed_over_with_a_warning(make_trainer, pipeline, caplog):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="run", **options).train()
    (Path("run/checkpoint-3") / checkpoints.FILES_LIST).unlink()
    (Path("run/checkpoint-2") / "optimizer.pt").write_bytes(b"")
    Path("run/.incomplete-checkpoint-4").mkdir()
    resumed = make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="run", **options)
    begun = []

    class Begin(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    resumed.add_callback(Begin())
    resumed.train(resume_from_checkpoint=True)
    assert begun == [1, 2]
    assert "passing over checkpoint-3" in caplog.text
    assert re.search("passing over checkpoint-2: .*optimizer.pt is damaged", caplog.text)
    assert [path.name for path in checkpoints.list_checkpoints(Path("run"))] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for number in (1, 2, 3):
        checkpoints.check(Path(f"run/checkpoint-{number}"))
    assert not list(Path("run").glob(".incomplete*"))


def test_nothing_to_resume_is_an_error(make_trainer):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        make_trainer(output_dir="empty").train(resume_from_checkpoint=True)


def test_only_the_newest_and_the_best_are_kept(make_trainer):
    make_trainer(output_dir="run", save_strategy="steps", save_steps=1, max_steps=4, save_total_limit=2).train()
    assert [path.name for path in checkpoints.list_checkpoints(Path("run"))] == ["checkpoint-3", "checkpoint-4"]
    for number in range(5, 8):
        Path(f"run/checkpoint-{number}").mkdir()
    checkpoints.rotate(Path("run"), 2, "run/checkpoint-3")
    assert [path.name for path in checkpoints.list_checkpoints(Path("run"))] == ["checkpoint-3", "checkpoint-7"]


def test_the_file_list_finds_a_changed_byte(tmp_path):
    folder = tmp_path / "checkpoint-1"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.bin").write_bytes(bytes(1000))
    checkpoints.seal(folder)
    checkpoints.check(folder)
    (folder / "sub" / "a.bin").write_bytes(bytes(999) + b"\x01")
    with pytest.raises(CheckpointError, match=r"a\.bin is damaged: its SHA-256"):
        checkpoints.check(folder)
    (folder / checkpoints.FILES_LIST).write_text("{")
    with pytest.raises(CheckpointError, match="rlr_files.json is damaged"):
        checkpoints.check(folder)


def test_no_object_is_unpickled_from_a_checkpoint(make_trainer, pipeline, tmp_path):
    """A file that would run code when unpickled is refused, though the list of files matches it."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "estimator": "ddpo", "num_inner_epochs": 2}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="run", **options).train()
    folder = Path("run/checkpoint-1")

    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    for name in ("rlr_state.pt", "rlr_rollout_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        content = (folder / name).read_bytes()
        torch.save(Harm(), folder / name)
        checkpoints.seal(folder)
        with pytest.raises(Exception, match=r"(?i)weights.only|cannot be read"):
            make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="run", **options | {"max_steps": 2}).train(
                resume_from_checkpoint=True
            )
        assert not (tmp_path / "harm").exists(), name
        (folder / name).write_bytes(content)


def test_metadata_that_cannot_be_stored_is_said(make_trainer, pipeline, caplog):
    options = {"estimator": "rlr", "control_variate": True, "num_inner_epochs": 2}
    options |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}

    def make():
        return make_trainer(
            sd_pipeline=copy.deepcopy(pipeline),
            output_dir="run",
            prompt_function=lambda: (digits.PROMPT, {"what": object()}),
            **options,
        )

    make().train()
    assert "this checkpoint, inside a rollout, cannot hold it" in caplog.text
    shutil.rmtree("run/checkpoint-2")
    with pytest.raises(CheckpointError, match="middle of a rollout whose metadata could not be stored"):
        make().train(resume_from_checkpoint=True)


def test_a_failing_reward_leaves_the_last_checkpoint_whole(make_trainer, pipeline):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError("broken on purpose")
        return images.mean((1, 2, 3))

    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "check_reward": False}
    whole = make_trainer(
        sd_pipeline=copy.deepcopy(pipeline), output_dir="whole", reward_function=lambda i, p, m: i.mean((1, 2, 3)), **options
    )
    whole.train()
    with pytest.raises(RewardError, match=r"broken on purpose"):
        make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="run", reward_function=reward, **options).train()
    resumed = make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="run", reward_function=reward, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(state_of(whole)["weights"], state_of(resumed)["weights"])


def test_a_full_disk_is_said_and_leaves_nothing_half_written():
    """The limit on file sizes makes real writes fail, as a full disk does."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_worker.py")), "full-disk"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    error = run.stdout
    assert re.search(r"cannot write .*checkpoint-2 .*GB are free there\. The run can go on from checkpoint-1", error), error
    assert [path.name for path in checkpoints.list_checkpoints(Path("run"))] == ["checkpoint-1"]
    assert not list(Path("run").glob(".incomplete*"))
    checkpoints.check(Path("run/checkpoint-1"))


def test_sigterm_saves_a_checkpoint_and_leaves(make_trainer, pipeline):
    options = {"save_strategy": "no", "max_steps": 4}
    whole = make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="whole", **options)
    whole.train()

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    stopped = make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="run", callbacks=[Terminate()], **options)
    with pytest.raises(SystemExit) as leaving:
        stopped.train()
    assert leaving.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [path.name for path in checkpoints.list_checkpoints(Path("run"))] == ["checkpoint-2"]
    resumed = make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(state_of(whole), state_of(resumed))


def test_a_handler_of_the_users_stays(make_trainer):
    before = signal.signal(signal.SIGTERM, handler := lambda number, frame: None)
    try:
        trainer = make_trainer(max_steps=1)
        with trainer.termination.taken():
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dataset", "function"])
def test_a_process_killed_at_random_moments(kind):
    """kill -9 twenty times and more, also while a checkpoint is written; the end is that of a run left alone."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_worker.py")), kind],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["kills"] >= 20
    assert report["with_a_half_written_checkpoint"] >= 1
    one, other = (Path(folder, "final") for folder in ("whole", "killed"))
    for name in ("weights.pt", "optimizer.pt"):
        assert_same(torch.load(one / name, weights_only=True), torch.load(other / name, weights_only=True), name)
    assert logged("killed") == logged("whole")
