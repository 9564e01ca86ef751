"""Callbacks: the sequence of events, the rollout's own, the run's files, progress bars, warnings of reward hacking."""

import copy
import io
import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments

from rlr_trainer import RLRCallback, digits
from rlr_trainer.cli import main
from rlr_trainer.observing import callbacks, monitor
from rlr_trainer.observing.callbacks import RolloutBar
from rlr_trainer.observing.monitor import RewardHackingMonitor
from rlr_trainer.observing.pictures import diversity, picture_grid, thumbnails

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture
def make_trainer(make_trainer):
    """Shorter chains: what is tested here does not depend on their length."""
    return lambda **options: make_trainer(**({"sample_num_steps": 2} | options))


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class Recorder(TrainerCallback):
    """Takes down (event, updates so far)."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_") and name != "on_rollout_end":
            return lambda args, state, control, **kwargs: self.events.append((name, state.global_step))
        return super().__getattribute__(name)


class TinyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.weight * x).mean() - 1) ** 2, "logits": self.weight * x}


def test_events_come_in_the_order_of_a_plain_trainer(make_trainer):
    options = {
        "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True,
        "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    ours, plain = Recorder(), Recorder()
    make_trainer(callbacks=[ours], eval_dataset=[{"prompt": digits.PROMPT}], per_device_train_batch_size=2, **options).train()
    row = {"x": torch.ones(1), "labels": torch.ones(1)}
    # one rollout an epoch: two micro-batches
    Trainer(
        TinyModel(), TrainingArguments("plain", per_device_train_batch_size=1, num_train_epochs=3, **options),
        train_dataset=[row] * 2, eval_dataset=[row], callbacks=[plain],
    ).train()  # fmt: skip
    assert ours.events == plain.events
    rare = {"on_rollout_end", "on_predict", "on_push_begin"}
    assert {name for name, _ in ours.events} == {name for name in dir(RLRCallback) if name.startswith("on_")} - rare


def test_a_callback_sees_every_rollout_and_may_stop_the_run(make_trainer):
    seen = []

    class Watcher(RLRCallback):
        def on_rollout_end(self, args, state, control, *, rollout, plan, model, optimizer, **kwargs):
            images, prompts, _, rewards, _ = rollout.pictures[0]
            seen.append((state.global_step, images.shape, prompts, rewards.clone(), rollout.rewards, plan, model, optimizer))
            control.should_training_stop = state.global_step == 1
            return control

    trainer = make_trainer(callbacks=[Recorder(), Watcher()], max_steps=5)  # the recorder has no such method
    trainer.train()
    assert [entry[0] for entry in seen] == [0, 1]
    assert trainer.state.global_step == 2
    _, shape, prompts, rewards, everyone, plan, model, optimizer = seen[0]
    assert shape == (4, 3, 32, 32)
    assert prompts == (digits.PROMPT,) * 4
    assert torch.equal(rewards, everyone)
    assert plan == trainer.plan
    assert model is trainer.model
    assert optimizer is not None


class Asks(RLRCallback):
    """Sets flags of the control at one event, after the first update."""

    def __init__(self, event, *flags):
        setattr(self, event, self.ask)
        self.flags, self.asked = flags, False

    def ask(self, args, state, control, **kwargs):
        if state.global_step == 1 and not self.asked:
            self.asked = True
            for flag in self.flags:
                setattr(control, flag, True)
        return control


def test_a_request_to_stop_inside_an_update_waits_for_its_end(make_trainer, pipeline):
    """Or the rest of the rollout would be saved with the checkpoint, and every later update would begin in the middle of one."""
    options = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "save_strategy": "epoch", "check_reward": False
    }  # fmt: skip
    whole = make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="whole", **options)
    expected = weights_after(whole)
    stopped = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    stopped.add_callback(Asks("on_rollout_end", "should_training_stop"))
    stopped.train()
    assert stopped.state.global_step == 2
    assert [row["step"] for row in stopped.state.log_history if "reward" in row] == [1, 2]
    resumed = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    resumed.train(resume_from_checkpoint=True)
    found = resumed.policy.trainable_parameters()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.rewards.queries == whole.rewards.queries == 3 * 4


def test_an_epoch_that_is_stopped_inside_an_update_ends_after_it(make_trainer):
    """An epoch of two updates: the second one of the first epoch is left out, and its samples feed the next."""
    trainer = make_trainer(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, sample_num_batches_per_epoch=4, max_steps=3,
        callbacks=[Asks("on_substep_end", "should_epoch_stop")],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(trainer._queue) == 2  # of the second rollout's four micro-batches, whole updates


def test_what_a_rollout_asks_for_is_done_after_its_update(make_trainer):
    asks = Asks("on_rollout_end", "should_save", "should_evaluate", "should_log")
    trainer = make_trainer(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, logging_strategy="no", save_strategy="steps", save_steps=9,
        eval_dataset=[{"prompt": digits.PROMPT}], callbacks=[asks],
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    assert [row["step"] for row in history if "reward" in row] == [row["step"] for row in history if "eval_reward" in row] == [2]
    assert (Path(trainer.args.output_dir) / "checkpoint-2/rlr_state.pt").is_file()


# ---- files ----


def test_files_of_a_run_and_of_its_resumption(make_trainer, pipeline):
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "num_log_images": 2,
        "log_images_steps": 1,
        "learning_rate": 2e-3,
    }
    first = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    first.train()
    folder = Path(first.args.output_dir)
    whole, rewards, run = (
        lines(folder / "metrics.jsonl"),
        lines(folder / "rewards.jsonl"),
        json.loads((folder / "run.json").read_text()),
    )
    seconds = [row["seconds"] for row in whole]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert [(row["rollout"], row["step"]) for row in rewards] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    for row, logged in zip(rewards, [row for row in whole if "reward" in row], strict=True):
        assert sum(row["rewards"]) / 4 == pytest.approx(logged["reward"], abs=1e-6)
    assert run["format"] == 1
    assert run["rewards"] == ["digit"]
    assert run["processes"] == 1
    assert run["trainable_parameters"] == sum(p.numel() for p in first.policy.trainable_parameters().values())
    assert run["options"]["num_log_images"] == 2
    assert run["changed"]["learning_rate"] == 2e-3
    assert run["changed"]["log_images_steps"] == 1
    assert "seed" not in run["changed"]  # left as it is by default
    assert "sample_batch_size" not in run["changed"]  # worked out, not given
    assert {"torch", "transformers", "diffusers", "trl", "rlr_trainer"} <= run["versions"].keys()
    assert "resumed" not in run

    resumed = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    again = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    assert again[1] == whole[1]
    assert again[2]["seconds"] > whole[1]["seconds"]  # goes on from the checkpoint's
    assert lines(folder / "rewards.jsonl") == rewards
    after = json.loads((folder / "run.json").read_text())
    assert after["started"] == run["started"]
    assert len(after["resumed"]) == 1
    assert sorted(path.name for path in folder.glob("samples/*.json")) == [
        "prompts.json",
        *(f"step_{n:06d}.json" for n in range(5)),
    ]


def test_dropped_samples_are_null_in_the_file(make_trainer):
    def partial(images, prompts, metadata):
        return [0.5, None, 0.25, math.nan]

    trainer = make_trainer(reward_function=partial, estimator="ddpo", max_steps=1)
    trainer.train()
    assert lines(Path(trainer.args.output_dir) / "rewards.jsonl")[0]["rewards"] == [0.5, None, 0.25, None]


def test_a_line_cut_off_by_a_crash_does_not_stop_a_resumption(make_trainer, pipeline):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    first = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    first.train()
    folder = Path(first.args.output_dir)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "los')
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options).train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert [row["step"] for row in lines(folder / "metrics.jsonl") if "loss" in row] == [1, 2]


def record(folder, step):
    return json.loads((Path(folder) / "samples" / f"step_{step:06d}.json").read_text())


def test_pictures_before_and_after_show_the_same_noise_with_other_weights(make_trainer):
    trainer = make_trainer(num_log_images=5, max_steps=2, learning_rate=1e-2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    before, after = record(folder, 0), record(folder, 2)
    assert not (folder / "samples/step_000001.json").exists()
    assert before["prompts"] == after["prompts"] == [digits.PROMPT] * 5
    assert before["step"] == 0
    assert 0 <= before["seconds"] < after["seconds"]
    for entry in (before, after):
        assert len(entry["rewards"]) == len(entry["files"]) == 5
        for file in entry["files"]:
            assert pixels(folder / "samples" / file).shape == (32, 32, 3)
        assert entry["diversity"] > 0
    assert before["rewards"] != after["rewards"]
    assert pixels(folder / "samples/step_000002.png").shape[1] > 3 * 128  # three columns, enlarged
    # the last set is what the trained weights make of that noise now: (prompt 0, repeat 0) is picture 0 of generate
    written = torch.tensor(pixels(folder / "samples" / after["files"][0])).permute(2, 0, 1) / 255
    torch.testing.assert_close(written, trainer.generate([digits.PROMPT], seed=trainer.args.seed)[0], rtol=0, atol=0.01)


def weights_after(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}


@pytest.mark.parametrize("check_reward", [True, False])
def test_pictures_and_evaluations_change_nothing_in_the_training(make_trainer, pipeline, seven, check_reward):
    """Not even with prompts and rewards that draw from the global generators."""

    def prompt():
        return digits.class_prompt(int(torch.randint(10, ()))), {}

    def noisy(images, prompts, metadata):
        return seven(images, prompts, metadata) + 0.1 * torch.rand(len(prompts))

    def run(**options):
        torch.default_generator.manual_seed(5)
        trainer = make_trainer(
            sd_pipeline=copy.deepcopy(pipeline), prompt_function=prompt, reward_function=noisy, check_reward=check_reward, **options
        )
        torch.default_generator.manual_seed(6)
        return trainer, weights_after(trainer)

    quiet, expected = run(output_dir="quiet")
    shown, found = run(
        output_dir="shown", num_log_images=3, log_images_steps=1, eval_strategy="steps", eval_steps=1, eval_on_start=True,
        eval_dataset=[{"prompt": digits.class_prompt(d)} for d in range(3)],
    )  # fmt: skip
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    own, more = run(
        output_dir="own", num_log_images=6
    )  # the pictures' prompts are the run's own: drawn ahead, and used all the same
    assert all(torch.equal(expected[name], more[name]) for name in expected)
    assert quiet.rewards.queries == shown.rewards.queries == own.rewards.queries
    assert (quiet.eval_queries, shown.eval_queries, own.eval_queries) == (0, 3 * 3 + 3 * 3, 2 * 6)
    assert len(set(record("own", 0)["prompts"])) > 1


def test_a_resumed_run_shows_the_pictures_of_its_beginning(make_trainer, pipeline):
    names = iter(digits.DIGIT_NAMES * 10)
    options = {"save_strategy": "steps", "save_steps": 1, "num_log_images": 3, "check_reward": False, "num_images_per_prompt": 2}

    def prompt():
        return f"{digits.PROMPT} {next(names)}", {"any": 1}

    first = make_trainer(sd_pipeline=copy.deepcopy(pipeline), prompt_function=prompt, max_steps=1, **options)
    first.train()
    folder = first.args.output_dir
    assert record(folder, 0)["prompts"] == [f"{digits.PROMPT} {name}" for name in ("zero", "zero", "one")]  # two prompts a rollout
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), prompt_function=prompt, max_steps=2, **options).train(
        resume_from_checkpoint=True
    )
    assert record(folder, 2)["prompts"] == record(folder, 0)["prompts"]


def test_overwriting_removes_the_pictures_of_the_other_run(make_trainer, pipeline):
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), num_log_images=1, max_steps=3).train()
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), num_log_images=1, max_steps=1, overwrite=True)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert sorted(path.stem for path in folder.glob("samples/step_*.json")) == ["step_000000", "step_000001"]
    assert len(lines(folder / "rewards.jsonl")) == 1


def test_a_run_that_is_stopped_from_outside_takes_no_pictures_at_its_end(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.termination.stopped = control.should_training_stop = True
            return control

    trainer = make_trainer(num_log_images=1, max_steps=3)
    trainer.add_callback(Stop())
    with pytest.raises(SystemExit):
        trainer.train()
    assert [path.stem for path in Path(trainer.args.output_dir).glob("samples/step_*.json")] == ["step_000000"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_log_images": -1}, "num_log_images=-1: must be a whole number"),
        ({"log_images_steps": 0}, "log_images_steps=0"),
        ({"eval_images_per_prompt": 0}, "eval_images_per_prompt=0"),
        ({"log_step_norms": True, "log_estimator_norms": False}, "set the latter to True"),
    ],
)
def test_options_of_the_log_are_checked(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


# ---- diversity ----


def test_diversity_is_the_mean_distance_of_pictures_of_one_prompt():
    images = torch.zeros(5, 3, 8, 8)
    images[1] += 0.5
    images[2, 0] += 1.0  # one of three channels: distance sqrt(1/3) to black
    images[4] += 0.2
    first = (0.5 + (1 / 3) ** 0.5 + ((0.25 + 0.25 + 0.25) / 3) ** 0.5) / 3
    assert diversity(images, ["a", "a", "a", "b", "b"]) == pytest.approx((first + 0.2) / 2, abs=1e-6)
    assert math.isnan(diversity(images, list("abcde")))
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert diversity(noise, ["a"] * 64) == pytest.approx((1 / 6) ** 0.5, abs=0.01)


def test_large_pictures_are_compared_as_thumbnails_and_videos_too():
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert thumbnails(images).shape == (2, 3 * 32 * 32)
    mean = images.reshape(2, 3, 32, 2, 32, 3).mean((3, 5)).flatten(1)
    torch.testing.assert_close(thumbnails(images), mean)
    video = torch.rand(2, 4, 3, 16, 16)
    assert thumbnails(video).shape == (2, 4 * 3 * 16 * 16)
    assert picture_grid(video, ["one", "two"]).size[0] > 2 * 128


def test_diversity_of_a_rollout_is_logged_where_prompts_repeat(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["diversity"] > 0
    rows = [{"prompt": digits.class_prompt(d)} for d in range(4)]
    trainer = make_trainer(max_steps=1, train_dataset=rows, output_dir="other")
    trainer.train()
    assert "diversity" not in trainer.state.log_history[0]


# ---- warnings ----


def watch(rows):
    """What the monitor says of a log, and after which line."""
    watcher, found = RewardHackingMonitor(), {}
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[])
    watcher.on_train_begin(None, state, None)
    for number, row in enumerate(rows):
        state.global_step = number + 1
        watcher.on_log(None, state, None, logs=row)
        for rule in watcher.warnings.keys() - found.keys():
            found[rule] = number
    return found


def curve(count, **series):
    return [{name: function(n / count) for name, function in series.items()} for n in range(count)]


def test_loss_of_diversity_while_the_reward_rises(caplog):
    collapse = curve(40, reward=lambda t: t, diversity=lambda t: 0.3 * (1 - t))
    with caplog.at_level(logging.WARNING, logger=monitor.__name__):
        assert set(watch(collapse)) == {"diversity"}
    (message,) = [entry.getMessage() for entry in caplog.records]  # once
    assert "loss of diversity" in message
    assert "raise kl_coef" in message
    assert not watch(curve(40, reward=lambda t: -t, diversity=lambda t: 0.3 * (1 - t)))  # the reward does not rise
    assert not watch(curve(40, reward=lambda t: t, diversity=lambda t: 0.3 - 0.12 * t))  # as in the demo
    assert not watch(curve(40, reward=lambda t: t))


def test_kl_that_grows_without_gain():
    runaway = curve(100, reward=lambda t: 0.5, kl=lambda t: math.exp(10 * t))
    assert set(watch(runaway)) == {"kl"}
    assert not watch(curve(100, reward=lambda t: t, kl=lambda t: math.exp(10 * t)))  # it gains
    assert not watch(curve(100, reward=lambda t: 0.5, kl=lambda t: t**2))  # the way every run starts
    assert not watch(runaway[:40])  # too early to tell


def test_training_reward_up_and_evaluation_reward_down():
    def rows(evaluation):
        for n in range(20):
            yield {"reward": n / 20, "reward_std": 0.2}
            if n % 4 == 3:
                yield {"eval_reward": evaluation(n / 20), "eval_reward_std": 0.2}

    assert set(watch(rows(lambda t: 0.5 - t / 2))) == {"evaluation"}
    assert not watch(rows(lambda t: t))
    assert not watch(rows(lambda t: 0.5 - t / 100))  # within the noise
    assert not watch(rows(lambda t: 0.1 if 0.5 < t < 0.6 else t))  # one bad evaluation


def test_a_run_that_resumes_remembers_its_beginning():
    rows = [row | {"step": n} for n, row in enumerate(curve(40, reward=lambda t: t, diversity=lambda t: 0.3 * (1 - t)))]
    watcher = RewardHackingMonitor()
    state = SimpleNamespace(global_step=30, is_world_process_zero=True, log_history=rows[:30])
    watcher.on_train_begin(None, state, None)
    watcher.on_log(None, state, None, logs=rows[30])
    assert set(watcher.warnings) == {"diversity"}


@pytest.mark.slow
def test_a_collapse_is_found_and_a_healthy_run_is_not_disturbed(capsys, caplog):
    with caplog.at_level(logging.WARNING, logger=monitor.__name__):
        assert main(["demo", "--output_dir", "healthy", "--quiet"]) == 0
        assert not [entry for entry in caplog.records if entry.name == monitor.__name__]
        assert (
            main(["demo", "--output_dir", "white", "--quiet", "--reward", "ink", "--estimator", "full_bp", "--max_steps", "12"])
            == 0
        )
        (entry,) = [entry for entry in caplog.records if entry.name == monitor.__name__]
        assert "loss of diversity" in entry.getMessage()


# ---- progress ----


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_counts_steps_and_rewards(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with RolloutBar(2, 3, disable=False) as bar:
        for _ in range(2):
            for step in range(3):
                bar.step(step)
                assert bar.bar.desc.startswith("rewards" if step == 2 else "sampling")
    assert bar.bar.n == bar.bar.total == 2 * (3 + 1)
    assert "sampling" in terminal.getvalue()
    assert "rewards" in terminal.getvalue()


def test_a_notebook_shows_the_bar(monkeypatch):
    """Its standard error is no terminal."""
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    monkeypatch.setattr(callbacks, "is_in_notebook", lambda: True)
    with RolloutBar(1, 2, disable=False) as bar:
        bar.step(0)
    assert "sampling" in output.getvalue()


@pytest.mark.parametrize(("terminal", "disable"), [(True, True), (False, False)])
def test_the_bar_is_quiet_when_it_should_be(monkeypatch, terminal, disable):
    output = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    with RolloutBar(1, 2, disable=disable) as bar:
        bar.step(0)
        bar.step(1)
    assert output.getvalue() == ""


def test_a_run_on_a_terminal_shows_both_bars(make_trainer, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    make_trainer(disable_tqdm=False, logging_strategy="no", max_steps=1).train()
    assert "sampling" in terminal.getvalue()
    assert "1/1" in terminal.getvalue()
