"""N updates = k updates, an end of any kind, resume, N - k updates: bit for bit."""

import copy
import json
import os
import random
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
from rlr_trainer.digits.rewards import ink
from rlr_trainer.estimators.presets import PRESETS
from rlr_trainer.persistence.checkpoints import CheckpointError, CheckpointStore
from rlr_trainer.training import running

pytestmark = pytest.mark.usefixtures("in_temporary_folder")

TIMED = ("time/", "train_", "seconds", "eval_runtime")
ROWS = [{"prompt": digits.class_prompt(d), "wanted": d} for d in range(3)]  # three prompts, batches of two: the order wraps
SAVES = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def make(make_trainer, pipeline):
    """A trainer on a pipeline of its own in a folder, with short chains and small batches."""
    small = {"sample_num_steps": 3, "per_device_train_batch_size": 2}
    return lambda folder, **options: make_trainer(
        **{"sd_pipeline": copy.deepcopy(pipeline), "output_dir": folder, **small, **options}
    )


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}


def state_of(trainer):
    """Everything that must not depend on the interruption."""
    state = {
        "weights": weights_of(trainer),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
    }
    with trainer.parts.weights.averaged():
        state["average"] = weights_of(trainer)
    return state | {name: part.state_dict() for name, part in trainer.parts.run_state.parts.items()}


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
    """metrics.jsonl without what a clock measured."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def saved(folder):
    return [path.name for path in CheckpointStore(folder).checkpoints()]


def check_resume(make, **options):
    """From the middle of a run of four updates, in a folder that has the lines past it."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"} | options
    whole = make("whole", **options)
    whole.train()
    shutil.copytree("whole/checkpoint-2", "resumed/checkpoint-2")
    for name in ("metrics.jsonl", "rewards.jsonl"):
        shutil.copy(f"whole/{name}", f"resumed/{name}")
    resumed = make("resumed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same(state_of(whole), state_of(resumed))
    assert logged("resumed") == logged("whole")
    assert Path("resumed/rewards.jsonl").read_text() == Path("whole/rewards.jsonl").read_text()


FLOW = ("flow_grpo", "mixgrpo")
EVERY_DAY = ("rlr", "rlr_black_box", "rlr_paper", "sqdf", "nft")  # one of each kind of estimator


@pytest.mark.parametrize("preset", [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS])
@pytest.mark.medium
def test_every_preset_goes_on_at_the_end_of_a_rollout(make, preset):
    """With two updates per rollout, except for zeroth order, which has one."""
    zeroth_order = preset in ("rlr_paper", "es")
    passes = (
        {"zo_num_perturbations": 2, "per_device_train_batch_size": 4} if zeroth_order else {"num_inner_epochs": 2, "save_steps": 1}
    )
    if preset in FLOW:
        passes |= {"sampler": "ddim"}  # the preset's own is for flow models
    if preset == "mixgrpo":
        passes |= {"noise_window_rollouts": 1}
    check_resume(make, estimator=preset, train_dataset=ROWS, **passes)
    assert saved("whole") == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    "options",
    [
        {"ho_start": "grad_norm", "fo_steps": 1, "ho_length": 2, "control_variate": True},
        {"estimator": "ddpo", "advantage": "per_prompt", "per_prompt_min_count": 2, "offload_rollouts": True},
        {"ema_decay": 0.9, "use_lora": False},
        {"gradient_accumulation_steps": 2, "logging_steps": 4},  # a log line that spans the checkpoint
        {"sample_num_batches_per_epoch": 4, "sample_batch_size": 1, "kl_coef": 0.1},
        {"estimator": "nft", "old_policy_decay": [0, 0.3, 0.5], "use_lora": False},  # half of an old policy is kept
        {"estimator": "ddpo", "silent_estimator": "none", "noise_steps": 1, "noise_window": "random"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.medium
def test_state_beside_weights(make, options):
    check_resume(make, train_dataset=ROWS, **options)


def draw_prompt():
    """Uses all three global generators."""
    choice = (random.randrange(10) + np.random.randint(10) + int(torch.randint(10, ()))) % 10
    return digits.class_prompt(choice), {"choice": choice}


@pytest.mark.medium
def test_prompts_of_the_global_generators(make):
    seen = []

    def reward(images, prompts, metadata):
        seen.append(prompts)
        return images.mean((1, 2, 3))

    check_resume(make, check_reward=False, prompt_function=draw_prompt, reward_function=reward)
    assert len({prompt for batch in seen for prompt in batch}) > 2


# ---- where checkpoints are, and where a run goes on ----


@pytest.mark.medium
def test_a_run_that_stops_inside_a_rollout_goes_on_with_a_new_one(make, caplog):
    options = {"num_inner_epochs": 2, "estimator": "ddpo", **SAVES}
    make("run", max_steps=3, **options).train()
    assert saved("run") == ["checkpoint-2", "checkpoint-3"]
    assert "the training stops inside a rollout: a run that goes on from here begins with a new one" in caplog.text
    resumed = make("run", max_steps=5, **options)
    resumed.train(resume_from_checkpoint=True)
    rows = [json.loads(line) for line in Path("run/rewards.jsonl").read_text().splitlines()]
    assert [(row["rollout"], row["step"]) for row in rows] == [(0, 0), (1, 2), (2, 3)]
    assert saved("run") == ["checkpoint-2", "checkpoint-3", "checkpoint-5"]


def test_going_on_from_an_earlier_checkpoint(make):
    make("run", max_steps=4, **SAVES).train()
    make("run", max_steps=3, save_total_limit=1, **SAVES).train(resume_from_checkpoint="run/checkpoint-2")
    assert saved("run") == ["checkpoint-3"]  # what was just written
    make("run", max_steps=4, **SAVES).train(resume_from_checkpoint=True)
    assert [row["step"] for row in logged("run")] == [1, 2, 3, 4, 4]  # with the closing line


@pytest.mark.medium
def test_a_finished_run_is_not_trained_on(make, caplog):
    """As a queue that restarts whatever ends does; the epoch has more updates than the run."""
    options = {"max_steps": 2, "train_dataset": ROWS * 3, **SAVES}
    whole, again = make("run", **options), make("run", **options)
    whole.train()
    before = logged("run")
    again.train(resume_from_checkpoint=True)
    assert "nothing is left to train: 2 updates are done, and 2 were asked for" in caplog.text
    assert_same(weights_of(whole), weights_of(again))
    assert logged("run") == before


@pytest.mark.medium
def test_the_best_checkpoint_is_that_of_the_best_metric(make, caplog):
    """Evaluations and checkpoints wait for the ends of rollouts together; the folder may move before the best one is loaded."""
    evaluations = []

    def worse_every_time(images, prompts, metadata):
        evaluations.append(1)
        return [-len(evaluations)] * len(prompts)

    def trainer(folder, updates):
        return make(
            folder, max_steps=updates, eval_dataset=[{"prompt": digits.PROMPT}] * 2, eval_strategy="steps", eval_steps=1, num_inner_epochs=2,
            load_best_model_at_end=True, metric_for_best_model="eval_reward", learning_rate=2e-2, eval_reward_function=worse_every_time,
            estimator="ddpo", **SAVES,
        )  # fmt: skip

    first = trainer("first", 5)
    first.train()
    assert [row["step"] for row in first.state.log_history if "eval_reward" in row] == [2, 4, 5]
    assert saved("first") == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert (first.state.best_metric, first.state.best_model_checkpoint) == (-1, "first/checkpoint-2")
    Path("first").rename("second")
    moved = trainer("second", 5)  # has nothing left to train
    moved.train(resume_from_checkpoint=True)
    assert moved.state.best_model_checkpoint == "second/checkpoint-2"
    reread = trainer("third", 5)
    reread.parts.weights.load(Path("second/checkpoint-2"))
    assert_same(weights_of(moved), weights_of(reread))


@pytest.mark.medium
def test_no_other_run_is_taken_up(make):
    for folder in ("one", "other"):
        make(folder, max_steps=1, **SAVES).train()
    log = Path("other/metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="cannot go on from one/checkpoint-1 in output_dir='other'"):
        make("other", max_steps=2, **SAVES).train(resume_from_checkpoint="one/checkpoint-1")
    assert Path("other/metrics.jsonl").read_text() == log


# ---- options that change ----


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"lora_r": 4}, ValueError, "does not fit the adapter being trained"),
        ({"use_lora": False}, CheckpointError, "the checkpoint's weights are of the other kind"),
    ],
)
@pytest.mark.medium
def test_weights_that_do_not_fit_are_refused(make, changed, error, message):
    make("run", max_steps=1, **SAVES).train()
    with pytest.raises(error, match=message):
        make("run", max_steps=2, **SAVES, **changed).train(resume_from_checkpoint=True)


@pytest.mark.medium
def test_what_changed_is_said_and_kept_in_the_run_file(make, caplog):
    make("run", reward_function=ink, max_steps=1, **SAVES).train()
    for updates in (2, 3):
        make("run", reward_function=[ink, ink], reward_weights=[1.0, 2.0], max_steps=updates, learning_rate=0.5, **SAVES).train(
            resume_from_checkpoint=True
        )
    assert "learning_rate=0.001 -> 0.5 has no effect" in caplog.text
    name = "rlr_trainer.digits.rewards:ink"
    assert f"max_steps=1 -> 2; reward_function='{name}' -> '{name}; {name}'" in caplog.text
    first, second = json.loads(Path("run/run.json").read_text())["resumed"]
    assert (first["update"], second["update"]) == (1, 2)
    assert first["changed"].keys() == {"max_steps", "rewards", "reward_functions", "eval_rewards", "reward_weights"}
    assert second["changed"] == {"max_steps": [2, 3]}


@pytest.mark.medium
def test_more_updates_stretch_the_schedule_from_the_first_on(make):
    options = {"lr_scheduler_type": "linear", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    make("run", max_steps=2, **options).train()
    make("run", max_steps=4, **options).train(resume_from_checkpoint=True)
    assert [row["learning_rate"] for row in logged("run") if "loss" in row][2:] == [0.5e-3, 0.25e-3]


# ---- ends of other kinds ----


@pytest.mark.medium
def test_a_failing_reward_leaves_the_last_checkpoint_whole(make):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError("broken on purpose")
        return images.mean((1, 2, 3))

    options = {"max_steps": 4, "check_reward": False, **SAVES}
    whole = make("whole", reward_function=lambda images, prompts, metadata: images.mean((1, 2, 3)), **options)
    whole.train()
    with pytest.raises(RewardError, match=r"broken on purpose"):
        make("run", reward_function=reward, **options).train()
    resumed = make("run", reward_function=reward, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights_of(whole), weights_of(resumed))


class Terminate(TrainerCallback):
    """In the first update of the second rollout."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("options", "checkpoints"),
    [
        pytest.param({"save_strategy": "no"}, [4], marks=pytest.mark.slow),
        pytest.param({"save_only_model": True, **SAVES}, [2, 4], marks=pytest.mark.slow),
        # without a learning rate nothing gets better
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_reward", "learning_rate": 0.0,
          "eval_dataset": [{"prompt": digits.PROMPT}]}, [2, 4]),
    ],
    ids=["no", "weights alone", "best"],
)  # fmt: skip
@pytest.mark.medium
def test_sigterm_saves_at_the_end_of_the_rollout_and_leaves(make, options, checkpoints, caplog):
    options = {"max_steps": 6, "num_inner_epochs": 2, "estimator": "ddpo", **options}
    whole = make("whole", **options)
    whole.train()
    stopped = make("run", callbacks=[Terminate()], **options)
    with pytest.raises(SystemExit) as leaving:
        stopped.train()
    assert leaving.value.code == 143
    assert "stopped after update 4, which is saved; continue with resume_from_checkpoint=True" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert saved("run") == [f"checkpoint-{updates}" for updates in checkpoints]
    assert stopped.args.save_only_model == options.get("save_only_model", False)
    resumed = make("run", **options)
    resumed.train(resume_from_checkpoint="run/checkpoint-4")
    assert_same(state_of(whole), state_of(resumed))
    assert logged("run") == logged("whole")


@pytest.mark.slow
def test_a_process_killed_at_random_moments():
    """kill -9 a dozen times, also while a checkpoint is written; the end is that of a run left alone."""
    worker = Path(__file__).parents[1] / "kill_worker.py"
    run = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, timeout=580, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["kills"] == 12
    assert report["with_a_half_written_checkpoint"] >= 1
    for name in ("weights.pt", "optimizer.pt"):
        assert_same(*(torch.load(Path(folder, "final", name), weights_only=True) for folder in ("whole", "killed")), name)
    assert logged("killed") == logged("whole")


@pytest.mark.medium
def test_the_log_in_a_checkpoint_does_not_grow_with_the_run(make_trainer, monkeypatch):
    """0.8 kB an update, in every checkpoint; the trainer and metrics.jsonl keep all of it."""
    shortened = running.shortened
    assert shortened(list(range(1000))) == list(range(1000))
    assert shortened(list(range(1007))) == [*range(10), *range(17, 1007)]
    monkeypatch.setattr(running, "shortened", lambda log: shortened(log, first=1, most=2))
    trainer = make_trainer(max_steps=4, **SAVES)
    trainer.train()
    stored = json.loads(Path(trainer.args.output_dir, "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in stored] == [1, 4]
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3, 4]
