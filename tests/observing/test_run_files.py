"""The run's files, without a trainer: what they hold, and what of it a resumed run keeps."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlr_trainer.observing import run_files
from rlr_trainer.observing.run_files import RunFiles

pytestmark = pytest.mark.usefixtures("in_temporary_folder")

ARGS = SimpleNamespace(output_dir="run")
FACTS = {"model": "m", "rewards": ["ink"], "options": {"lora_r": 2}, "changed": {"max_steps": 4}, "versions": {"torch": "2"}}


def state_at(step):
    return SimpleNamespace(global_step=step, is_world_process_zero=True, best_global_step=None, best_model_checkpoint=None)


def lines(name):
    return [json.loads(line) for line in Path("run", name).read_text().splitlines()]


def run():
    return json.loads(Path("run/run.json").read_text())


def train(begin=0, end=2, facts=FACTS):
    """One rollout and one log line an update, and the line at the end."""
    files = RunFiles(lambda: facts)
    files.on_train_begin(ARGS, state_at(begin), None)
    for step in range(begin, end):
        rollout = SimpleNamespace(rewards=torch.tensor([0.5, math.nan]) + step)
        files.on_rollout_end(ARGS, state_at(step), None, rollout=rollout, plan=None)
        files.on_log(ARGS, state_at(step + 1), None, logs={"loss": torch.tensor(1.5), "reward": math.inf})
    files.on_log(ARGS, state_at(end), None, logs={"train_runtime": 3.0, "train_loss": 1.5})
    return files


def test_what_a_run_writes():
    train()
    assert run().keys() == {"format", "started"} | FACTS.keys()
    assert lines("rewards.jsonl") == [
        {"rollout": 0, "step": 0, "rewards": [0.5, None]},
        {"rollout": 1, "step": 1, "rewards": [1.5, None]},
    ]
    first, _, closing = lines("metrics.jsonl")
    assert first == {"step": 1, "seconds": first["seconds"], "loss": 1.5, "reward": None}
    assert closing == {"step": 2, "seconds": closing["seconds"], "train_runtime": 3.0}
    assert 0 <= first["seconds"] <= closing["seconds"]


def test_an_evaluation_before_the_training_leaves_no_file():
    files = RunFiles(lambda: FACTS)
    files.on_log(ARGS, state_at(0), None, logs={"eval_reward": 1.0})
    assert files.seconds == 0
    assert not Path("run").exists()


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_has_the_lines_of_one_that_was_never_stopped(step):
    """From inside, and from the end of a run that was stopped: its closing line goes."""
    train(end=2)
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "los')  # cut off by a crash
    metrics = lines_without_the_last()
    train(begin=step, end=3)
    resumed = lines("metrics.jsonl")
    assert [row["step"] for row in resumed] == [1, 2, 3, 3]
    assert resumed[:step] == metrics[:step]
    assert resumed[step]["seconds"] >= metrics[step - 1]["seconds"]
    assert [row for row in resumed if "train_runtime" in row] == resumed[-1:]
    assert [(row["rollout"], row["step"]) for row in lines("rewards.jsonl")] == [(0, 0), (1, 1), (2, 2)]


def lines_without_the_last():
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()[:-1]]


def test_a_new_run_begins_the_files_anew():
    train()
    train(end=1)
    assert len(lines("metrics.jsonl")) == 2
    assert len(lines("rewards.jsonl")) == 1
    assert "resumed" not in run()


def test_the_run_file_says_what_was_changed_and_when():
    train()
    started = run()["started"]
    changed = FACTS | {"rewards": ["ink", "digit"], "changed": {"max_steps": 6, "learning_rate": 1.0, "output_dir": "moved"}}
    train(begin=2, end=4, facts=changed)
    train(begin=4, end=6, facts=changed)
    assert run()["started"] == started
    first, second = run()["resumed"]
    assert (first["update"], second["update"]) == (2, 4)
    assert first["changed"] == {"max_steps": [4, 6], "rewards": [["ink"], ["ink", "digit"]]}  # the learning rate has no effect
    assert second["changed"] == {}
    train(begin=2, end=4)  # from before the second resumption, as the run was at first
    assert [(entry["update"], entry["changed"].keys()) for entry in run()["resumed"]] == [
        (2, {"max_steps", "rewards"}),
        (2, {"max_steps", "rewards"}),
    ]


@pytest.mark.parametrize("content", ["", "{", "null"])
def test_a_damaged_run_file_is_written_anew(content):
    train()
    Path("run/run.json").write_text(content)
    train(begin=2, end=4)
    assert run()["format"] == 1
    assert len(run()["resumed"]) == 1


def test_a_full_disk_leaves_what_was_there():
    """/dev/full fails as a full disk does."""
    train()
    before = Path("run/metrics.jsonl").read_text()
    Path("run/_metrics.jsonl.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write run/metrics.jsonl: No space left on device"):
        train(begin=2, end=4)
    assert Path("run/metrics.jsonl").read_text() == before
    assert not list(Path("run").glob("_*"))
    with pytest.raises(OSError, match=r"cannot write /dev/full: No space left on device"):
        run_files._append(Path("/dev/full"), {"step": 1})


@pytest.mark.medium
def test_what_a_trainer_tells_of_itself(make_trainer):
    trainer = make_trainer(max_steps=1, sample_num_steps=2, learning_rate=2e-3, output_dir="run")
    trainer.train()
    assert run()["rewards"] == ["digit_7"]
    assert run()["processes"] == 1
    assert run()["trainable_parameters"] == sum(p.numel() for p in trainer.policy.trainable_parameters().values())
    assert run()["options"]["sample_num_steps"] == 2
    assert run()["changed"]["learning_rate"] == 2e-3
    assert not {"seed", "sample_batch_size"} & run()["changed"].keys()  # left as it is by default; worked out, not given
    assert {"torch", "transformers", "diffusers", "trl", "rlr_trainer"} <= run()["versions"].keys()
    (row,) = [row for row in lines("metrics.jsonl") if "reward" in row]
    assert sum(lines("rewards.jsonl")[0]["rewards"]) / 4 == pytest.approx(row["reward"], abs=1e-6)
