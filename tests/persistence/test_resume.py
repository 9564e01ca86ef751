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

from rlr_trainer import RewardError, digits
from rlr_trainer.digits.rewards import digit_reward, ink
from rlr_trainer.observing import callbacks
from rlr_trainer.persistence import checkpoints
from rlr_trainer.persistence import run_state as resuming
from rlr_trainer.persistence.checkpoints import CheckpointError

TIMED = ("time/", "train_", "seconds")
PRESETS = ("rlr", "rlr_paper", "ddpo", "draft", "alignprop", "full_bp", "sqdf", "es")


pytestmark = pytest.mark.usefixtures("in_temporary_folder")


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
    Path("run/_incomplete-checkpoint-4").mkdir()
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
    assert not list(Path("run").glob("_incomplete*"))


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


def test_later_checkpoints_are_renamed_when_a_run_goes_on_from_an_earlier_one(make_trainer, pipeline, caplog):
    def make(**options):
        return make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="run", save_strategy="steps", save_steps=1, **options)

    make(max_steps=4).train()
    make(max_steps=3, save_total_limit=1).train(resume_from_checkpoint="run/checkpoint-2")
    assert [path.name for path in checkpoints.list_checkpoints(Path("run"))] == ["checkpoint-3"]  # what was just written
    assert sorted(path.name for path in Path("run").glob("_*")) == ["_superseded-checkpoint-3", "_superseded-checkpoint-4"]
    assert "run/checkpoint-4 lies past update 2" in caplog.text
    resumed = make(max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert [row["step"] for row in logged("run")] == [1, 2, 3, 4]


def test_a_finished_run_is_not_trained_on(make_trainer, pipeline, caplog):
    """As a queue that restarts whatever ends does; the epoch has more updates than the run."""

    def make():
        options = {"output_dir": "run", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        return make_trainer(sd_pipeline=copy.deepcopy(pipeline), train_dataset=ROWS * 4, **options)

    whole, again = make(), make()
    whole.train()
    again.train(resume_from_checkpoint=True)
    assert "nothing is left to train: 2 updates are done, and 2 were asked for" in caplog.text
    assert again.state.global_step == 2
    assert_same(state_of(whole)["weights"], state_of(again)["weights"])
    assert [path.name for path in checkpoints.list_checkpoints(Path("run"))] == ["checkpoint-1", "checkpoint-2"]


def test_the_best_checkpoint_is_found_in_a_folder_that_moved(make_trainer, pipeline, caplog):
    evaluations = []

    def worse_every_time(images, prompts, metadata):
        evaluations.append(1)
        return [-len(evaluations)] * len(prompts)

    def make(folder, updates):
        return make_trainer(
            sd_pipeline=copy.deepcopy(pipeline), output_dir=folder, max_steps=updates, save_strategy="steps", save_steps=1,
            eval_dataset=[{"prompt": digits.PROMPT}] * 2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
            metric_for_best_model="eval_reward", learning_rate=2e-2, eval_reward_function=worse_every_time,
        )  # fmt: skip

    make("first", 2).train()
    Path("first").rename("second")
    moved = make("second", 2)  # has nothing left to train
    moved.train(resume_from_checkpoint=True)
    assert moved.state.best_model_checkpoint == "second/checkpoint-1"
    best = {name: p.detach().clone() for name, p in moved.policy.trainable_parameters().items()}
    reread = make("third", 2)
    reread._load_weights(Path("second/checkpoint-1"))
    assert_same(best, {name: p.detach().clone() for name, p in reread.policy.trainable_parameters().items()})
    shutil.rmtree("second/checkpoint-1")  # copied in part
    lost = make("second", 3)
    lost.train(resume_from_checkpoint=True)
    assert "second/checkpoint-1, is not there" in caplog.text
    assert lost.state.best_model_checkpoint is None


@pytest.mark.parametrize("given", ["nowhere", "run"])
def test_a_folder_that_is_no_checkpoint(make_trainer, given):
    Path("run/checkpoint-7").mkdir(parents=True)
    message = {"nowhere": "there is no such folder", "run": "a folder of them; give one, such as run/checkpoint-7"}[given]
    with pytest.raises(CheckpointError, match=f"{given} is not a complete checkpoint.*{message}"):
        make_trainer(output_dir="other").train(resume_from_checkpoint=given)


def test_a_run_s_folder_does_not_take_up_another_run(make_trainer, pipeline):
    def make(folder, **options):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "output_dir": folder} | options
        return make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)

    make("one").train()
    make("other", max_steps=2).train()
    log = Path("other/metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="cannot go on from one/checkpoint-1 in output_dir='other', which holds another run"):
        make("other", max_steps=2).train(resume_from_checkpoint="one/checkpoint-1")
    assert Path("other/metrics.jsonl").read_text() == log
    make("other", max_steps=2, overwrite=True).train(resume_from_checkpoint="one/checkpoint-1")
    assert [path.name for path in checkpoints.list_checkpoints(Path("other"))] == ["checkpoint-2"]
    make("new", max_steps=2).train(resume_from_checkpoint="one/checkpoint-1")


def test_overwriting_removes_checkpoints_and_nothing_else(make_trainer, pipeline):
    def make(**options):
        options = {"save_strategy": "steps", "save_steps": 1, "output_dir": "run"} | options
        return make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)

    make(max_steps=3).train()
    Path("run/checkpoint-3").rename("moved")
    Path("run/checkpoint-3").symlink_to("../moved")
    Path("run/checkpoint-notes.txt").write_text("mine")
    Path("run/checkpoint-mine").mkdir()
    make(max_steps=1, overwrite=True).train()
    assert sorted(path.name for path in Path("run").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-mine",
        "checkpoint-notes.txt",
    ]
    checkpoints.check(Path("moved"))


# ---- options that change ----


@pytest.mark.parametrize(
    "changed", [{"kl_coef": 0.1}, {"sample_num_steps": 3}, {"estimator": "rlr"}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_what_made_a_rollout_cannot_change_inside_it(make_trainer, pipeline, changed):
    options = {"estimator": "ddpo", "num_inner_epochs": 2, "save_strategy": "steps", "save_steps": 1, "output_dir": "run"}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=1, **options).train()
    (name,) = changed
    with pytest.raises(CheckpointError, match=rf"with .*{name}=.* -> .*: it was saved in the middle of a rollout"):
        make_trainer(sd_pipeline=pipeline, max_steps=2, **(options | changed)).train(resume_from_checkpoint=True)


def test_what_was_learned_for_another_chain_is_learned_anew(make_trainer, pipeline, caplog):
    options = {"estimator": "rlr", "ho_start": "grad_norm", "control_variate": True, "output_dir": "run"}
    options |= {"save_strategy": "steps", "save_steps": 1}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=1, ho_length=2, **options).train()
    resumed = make_trainer(sd_pipeline=pipeline, max_steps=2, ho_length=1, sample_num_steps=6, **options)
    resumed.train(resume_from_checkpoint=True)
    assert "ho_start='grad_norm' draws by: the checkpoint has it for another chain" in caplog.text
    assert "control variate: the checkpoint has it for another chain" in caplog.text
    assert len(resumed.starts.state_dict()["norms"]) == resumed.plan.num_starts
    assert len(resumed.control_scale.state_dict()["moments"]) == 6


def test_auto_can_be_given_up_and_taken_up(make_trainer, pipeline, monkeypatch):
    monkeypatch.setattr("rlr_trainer.diagnosis.auto_ho_length", lambda *arguments, **options: 2)
    auto = {"ho_length": "auto", "memory_budget_gb": 1.0, "recompute": "graph"}
    found = []
    for updates, options in enumerate([auto, {"ho_length": 1}, auto], start=1):
        trainer = make_trainer(
            sd_pipeline=copy.deepcopy(pipeline), estimator="rlr", fo_steps=1, output_dir="run", save_strategy="steps", save_steps=1,
            max_steps=updates, **options,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=updates > 1 or None)
        found.append(trainer.plan.ho_length)
    assert found == [2, 1, 2]


@pytest.mark.parametrize("changed", [{"optim": "sgd"}, {"use_lora": False}], ids=str)
def test_weights_and_optimizer_of_another_kind_are_refused(make_trainer, pipeline, changed):
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": "run"}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=1, **options).train()
    (name,) = changed
    with pytest.raises(CheckpointError, match=f"with {name}=.*; set {name}="):
        make_trainer(sd_pipeline=pipeline, max_steps=2, **(options | changed)).train(resume_from_checkpoint=True)


def test_a_changed_learning_rate_is_said_to_have_no_effect(make_trainer, pipeline, caplog):
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": "run", "lr_scheduler_type": "constant"}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=1, **options).train()
    resumed = make_trainer(sd_pipeline=pipeline, max_steps=2, learning_rate=0.5, max_grad_norm=3.0, **options)
    resumed.train(resume_from_checkpoint=True)
    assert "learning_rate=0.001 -> 0.5 has no effect" in caplog.text
    assert "with other options: max_grad_norm=1.0 -> 3.0; max_steps=1 -> 2" in caplog.text
    assert "reward_function" not in caplog.text
    assert [row["learning_rate"] for row in logged("run")] == [1e-3, 1e-3]


def test_another_reward_function_is_told_of(make_trainer, pipeline, caplog):
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": "run"}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), reward_function=ink, max_steps=1, **options).train()
    resumed = make_trainer(sd_pipeline=copy.deepcopy(pipeline), reward_function=[ink, digit_reward(3)], max_steps=2, **options)
    resumed.train(resume_from_checkpoint=True)
    assert "with other options: max_steps=1 -> 2; reward_function=['ink'] -> ['ink', 'digit']" in caplog.text
    last = make_trainer(sd_pipeline=pipeline, reward_function=[ink, digit_reward(3)], max_steps=3, **options)
    last.train(resume_from_checkpoint=True)
    first, second = json.loads(Path("run/run.json").read_text())["resumed"]
    assert (first["update"], second["update"]) == (1, 2)
    assert first["changed"] == {
        "max_steps": [1, 2],
        "rewards": [["ink"], ["ink", "digit"]],
        "eval_rewards": [["ink"], ["ink", "digit"]],
    }
    assert second["changed"] == {"max_steps": [2, 3]}


def test_another_reward_function_inside_a_rollout_is_refused(make_trainer, pipeline):
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": "run", "num_inner_epochs": 2, "estimator": "ddpo"}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), reward_function=ink, max_steps=1, **options).train()
    resumed = make_trainer(sd_pipeline=pipeline, max_steps=2, **options)
    with pytest.raises(
        CheckpointError, match=r"with reward_function=\['ink'\] -> \['digit'\]: it was saved in the middle of a rollout"
    ):
        resumed.train(resume_from_checkpoint=True)


def test_a_rollout_saved_on_another_device(make_trainer, pipeline, monkeypatch):
    """The file says that its tensors were on a GPU; this machine may have none."""
    options = {"estimator": "ddpo", "num_inner_epochs": 2, "save_strategy": "steps", "save_steps": 1, "output_dir": "run"}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=1, **options).train()
    file = Path("run/checkpoint-1/rlr_rollout_0.pt")
    with torch.serialization.safe_globals(resuming.ROLLOUT_CLASSES):
        rollout = torch.load(file, weights_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        torch.save(rollout, file)
    checkpoints.seal(file.parent)
    resumed = make_trainer(sd_pipeline=pipeline, max_steps=2, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


# ---- the run's files ----


def test_a_full_disk_leaves_the_log_of_a_resumed_run(make_trainer, pipeline):
    """/dev/full fails as a full disk does."""
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": "run"}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=1, **options).train()
    log = Path("run/metrics.jsonl").read_text()
    Path("run/_metrics.jsonl.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write run/metrics.jsonl: No space left on device"):
        make_trainer(sd_pipeline=pipeline, max_steps=2, **options).train(resume_from_checkpoint=True)
    assert Path("run/metrics.jsonl").read_text() == log
    assert not list(Path("run").glob("_*"))
    with pytest.raises(OSError, match=r"cannot write /dev/full: No space left on device"):
        callbacks._append(Path("/dev/full"), {"step": 1})


@pytest.mark.parametrize("content", ["", "{", "null"])
def test_a_damaged_run_file_is_written_anew(make_trainer, pipeline, content):
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": "run"}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=1, **options).train()
    Path("run/run.json").write_text(content)
    make_trainer(sd_pipeline=pipeline, max_steps=2, **options).train(resume_from_checkpoint=True)
    run = json.loads(Path("run/run.json").read_text())
    assert run["format"] == 1
    assert len(run["resumed"]) == 1


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
        [sys.executable, str(Path(__file__).parents[1] / "kill_worker.py"), "full-disk"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    error = run.stdout
    assert re.search(r"cannot write .*checkpoint-2 .*GB are free there\. The run can go on from checkpoint-1", error), error
    assert [path.name for path in checkpoints.list_checkpoints(Path("run"))] == ["checkpoint-1"]
    assert not list(Path("run").glob("_incomplete*"))
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


class TerminateAtTwo(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", ["best", "weights alone"])
def test_sigterm_leaves_a_checkpoint_that_can_be_resumed(make_trainer, pipeline, kind):
    """Where the options ask for one only at a better evaluation, or for the weights alone."""
    options = {"save_only_model": True, "save_strategy": "steps", "save_steps": 1}
    if kind == "best":  # without a learning rate nothing gets better
        options = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_reward",
                   "greater_is_better": True, "learning_rate": 0.0, "eval_dataset": [{"prompt": digits.PROMPT}] * 2}  # fmt: skip
    stopped = make_trainer(
        sd_pipeline=copy.deepcopy(pipeline), output_dir="run", max_steps=3, callbacks=[TerminateAtTwo()], **options
    )
    with pytest.raises(SystemExit):
        stopped.train()
    assert [path.name for path in checkpoints.list_checkpoints(Path("run"))] == ["checkpoint-1", "checkpoint-2"]
    assert stopped.args.save_only_model == (kind == "weights alone")
    resumed = make_trainer(sd_pipeline=pipeline, output_dir="run", max_steps=3, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.seen[state.global_step] = optimizer.param_groups[0]["lr"]


def test_more_updates_stretch_the_schedule_from_the_first_on(make_trainer, pipeline):
    """Left to Trainer, the first update has the rate with which the shorter run would have gone on: 0 at its end."""
    options = {"output_dir": "run", "lr_scheduler_type": "linear", "learning_rate": 1e-3}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=2, save_strategy="steps", save_steps=2, **options).train()
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=4, callbacks=[rates := Rates()], **options)
    trainer.train(resume_from_checkpoint=True)
    assert rates.seen == {2: 0.5e-3, 3: 0.25e-3}
    assert [row["learning_rate"] for row in logged("run")][2:] == [0.5e-3, 0.25e-3]


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
        [sys.executable, str(Path(__file__).parents[1] / "kill_worker.py"), kind],
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
