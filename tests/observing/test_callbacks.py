"""Callbacks: the sequence of events, the rollout's own, and requests that wait."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from rlr_trainer import RLRCallback, digits
from rlr_trainer.observing.callbacks import BetweenRollouts, RolloutCallbackHandler

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


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


@pytest.mark.medium
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


@pytest.mark.medium
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


# ---- the handler without a trainer ----


class Named(RLRCallback):
    """Takes down its name at every end of a rollout, and sets flags of the control at one event."""

    def __init__(self, name, seen, event=None, *flags):
        self.name, self.seen, self.flags = name, seen, flags
        if event:
            setattr(self, event, self.ask)

    def on_rollout_end(self, args, state, control, *, rollout, plan, model, **kwargs):
        self.seen.append((self.name, rollout, plan, model))

    def ask(self, args, state, control, **kwargs):
        for flag in self.flags:
            setattr(control, flag, True)
        return control


def handler(callbacks, observers=()):
    parts = {"model": "the model", "processing_class": None, "optimizer": None, "lr_scheduler": None}
    return RolloutCallbackHandler(SimpleNamespace(callbacks=callbacks, **parts), observers)


def test_observers_come_first_and_plain_callbacks_know_nothing_of_rollouts():
    seen = []
    told = handler([Named("user", seen), TrainerCallback()], [Named("first", seen), Named("second", seen)])
    control = TrainerControl()
    assert told.on_rollout_end(None, None, control, rollout="a rollout", plan="a plan") is control
    assert seen == [(name, "a rollout", "a plan", "the model") for name in ("first", "second", "user")]


@pytest.mark.parametrize("flag", ["should_training_stop", "should_epoch_stop"])
def test_a_request_to_stop_inside_an_update_waits_for_its_end(flag):
    """Trainer would stop between two micro-batches, and lose their gradient."""
    told, control = handler([Named("user", [], "on_substep_end", flag)]), TrainerControl()
    assert not getattr(told.on_substep_end(None, None, control), flag)
    assert getattr(told.on_step_end(None, None, control), flag)
    setattr(control, flag, False)
    assert not getattr(told.on_step_end(None, None, control), flag)  # once
    told.on_substep_end(None, None, control)
    told.on_train_begin(None, None, control)  # another training knows nothing of it
    assert not getattr(told.on_step_end(None, None, control), flag)


# ---- between rollouts ----


def asked(**flags):
    return TrainerControl(**{f"should_{name}": True for name in flags})


def flags(control):
    return {name for name in ("save", "evaluate", "training_stop") if getattr(control, f"should_{name}")}


def test_requests_inside_a_rollout_are_met_at_its_end_and_once():
    between = BetweenRollouts()
    for wanted in ("save", "evaluate"):
        between.hold(control := asked(**{wanted: True}), inside=True)
        assert flags(control) == set()
    between.hold(control := asked(), inside=False)
    assert flags(control) == {"save", "evaluate"}
    between.hold(control := asked(), inside=False)
    assert flags(control) == set()
    between.hold(control := asked(save=True), inside=False)
    assert flags(control) == {"save"}


def test_a_training_that_stops_inside_a_rollout_saves_at_once(caplog):
    between = BetweenRollouts()
    between.hold(asked(save=True, evaluate=True), inside=True)
    between.hold(control := asked(training_stop=True), inside=True)
    assert flags(control) == {"save", "evaluate", "training_stop"}
    assert "a run that goes on from here begins with a new one" in caplog.text


@pytest.mark.medium
def test_requests_of_a_training_are_met_after_the_updates_of_the_rollout(make_trainer):
    """Those that come with the second rollout, and with the first update of it."""

    class Asks(RLRCallback):
        def on_rollout_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 2
            return control

        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = state.global_step == 3
            return control

    trainer = make_trainer(
        estimator="ddpo", sample_num_steps=2, num_inner_epochs=2, max_steps=4, save_strategy="steps", save_steps=9, callbacks=[Asks()],
        eval_dataset=[{"prompt": digits.PROMPT}],
    )  # fmt: skip
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "eval_reward" in row] == [4]
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-4"]
