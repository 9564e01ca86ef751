"""Uploads: when they are made, what they hold, and what happens when they are slow or fail."""

import logging
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load, load_file
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from rlr_trainer.persistence.hub import HubUploads
from rlr_trainer.pipelines import LORA_FILE

pytestmark = pytest.mark.usefixtures("in_temporary_folder")

OPTIONS = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "output_dir": "run"}


class Trainer:
    """Takes down what is asked of it."""

    hub_model_id = "somebody/run"

    def __init__(self, **options):
        defaults = {"hub_strategy": HubStrategy.EVERY_SAVE, "hub_always_push": False, "push_to_hub": True}
        names = {"output_dir": "run", "hub_model_id": None, "hub_private_repo": None}
        self.args = SimpleNamespace(**defaults | names | options)
        self.calls, self.push_in_progress = [], None

    def save_model(self, folder, _internal_call):
        self.calls.append(f"save {folder}")

    def push_to_hub(self):
        self.calls.append("push at the end")

    def is_world_process_zero(self):
        return True

    def _finish_current_push(self):
        self.calls.append("finish")


def push_of(job):
    return SimpleNamespace(is_done=job.done, jobs=[job])


def uploads(**options):
    trainer = Trainer(**options)
    return HubUploads(trainer, SimpleNamespace(of_main=lambda value: value)), trainer


def test_a_save_is_pushed_with_the_weights_for_use():
    hub, trainer = uploads()
    hub.at_save(lambda: trainer.calls.append("push"))
    hub.at_end()
    assert trainer.calls == ["save run", "push"]


def test_the_end_strategy_pushes_once():
    hub, trainer = uploads(hub_strategy=HubStrategy.END)
    hub.at_save(lambda: trainer.calls.append("push"))
    hub.at_end()
    assert trainer.calls == ["push at the end"]


def test_a_save_during_an_upload_writes_over_no_file_and_follows_at_the_end():
    hub, trainer = uploads()
    trainer.push_in_progress = push_of(Future())
    hub.at_save(lambda: trainer.calls.append("push"))
    assert trainer.calls == []
    hub.at_end()
    assert trainer.calls == ["push at the end"]


def test_an_upload_that_failed_in_the_background_is_said_once(caplog):
    hub, trainer = uploads()
    job = Future()
    job.set_exception(ConnectionError("no route on purpose"))
    trainer.push_in_progress = push_of(job)
    for _ in range(2):
        hub.warn_of_failures()
    assert caplog.messages == ["an upload to somebody/run failed: ConnectionError: no route on purpose"]


def test_a_push_that_fails_is_an_error_in_the_log_and_the_way_out(caplog):
    hub, _ = uploads()

    def upload(message, **how):
        raise ConnectionError("no route on purpose")

    assert hub.push(upload, "name", None, "End of training") is None
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "the upload to name failed: ConnectionError: no route on purpose" in caplog.text
    assert "`hf upload name run` uploads them" in caplog.text


@pytest.mark.parametrize(
    ("repo_id", "message", "repository"),
    [(None, "End of training", None), ("name", "End of training", "name"), ("two words", "two words", None)],
)
def test_the_first_argument_is_a_repository_or_a_message(repo_id, message, repository):
    hub, trainer = uploads()
    pushed = []
    hub.push(lambda message, **how: pushed.append((message, how)), repo_id, True, "End of training", revision="main")
    assert pushed == [(message, {"revision": "main"})]
    assert trainer.args.hub_model_id == repository
    assert trainer.args.hub_private_repo is True
    assert trainer.calls == (["finish"] if repository else [])


@pytest.mark.medium
def test_a_training_uploads_the_last_weights_however_slow_the_hub_is(make_trainer, hub):
    """And neither what is half written nor what is superseded."""
    answers = []

    def slow():
        answers.append(Future())
        return answers[-1]

    class End(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            for answer in answers:
                answer.set_result(None)

    hub.answer = slow
    for folder in ("_superseded-checkpoint-3", "_incomplete-checkpoint-4/checkpoint-4"):
        Path("run", folder).mkdir(parents=True)
        Path("run", folder, "optimizer.pt").write_bytes(b"half")
    trainer = make_trainer(callbacks=[End()], **OPTIONS)
    trainer.train()
    assert len(hub.uploads) == 2
    content = hub.uploads[-1][1]
    found, expected = load(content[LORA_FILE]), load_file(f"run/checkpoint-2/{LORA_FILE}")
    assert all(found[name].equal(expected[name]) for name in expected)
    assert not [name for name in content if "checkpoint-" in name]


@pytest.mark.medium
def test_a_trainer_pushes_to_a_repository_and_a_branch(make_trainer, hub):
    trainer = make_trainer(output_dir="run", max_steps=1)
    trainer.train()
    trainer.push_to_hub(repo_id="other", branch="tried", private=True)
    ((repository, content),) = hub.uploads
    assert repository == "somebody/other"
    assert hub.private == {"somebody/other": True}
    assert content.keys() >= {LORA_FILE, "README.md"}
