"""Uploads while training goes on: what they hold, what happens when they are slow, and when they fail."""

import copy
from concurrent.futures import Future
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load, load_file

from rlr_trainer.pipelines import LORA_FILE

pytestmark = pytest.mark.usefixtures("in_temporary_folder")

OPTIONS = {
    "push_to_hub": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "output_dir": "run",
}


def failed():
    answer = Future()
    answer.set_exception(ConnectionError("no route on purpose"))
    return answer


def same(left, right):
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def test_a_failed_upload_is_said_and_the_run_goes_on(make_trainer, hub, caplog):
    hub.answer = failed
    trainer = make_trainer(**OPTIONS)
    trainer.train()
    assert trainer.state.global_step == 3
    assert caplog.text.count("an upload to somebody/run failed: ConnectionError: no route on purpose") == 3


def test_a_slow_upload_keeps_its_files_and_the_last_weights_follow(make_trainer, hub):
    written = []

    def slow():
        answer = Future()
        written.append((Path("run") / LORA_FILE).read_bytes())
        return answer

    hub.answer = slow
    trainer = make_trainer(**OPTIONS)

    class End(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            written.append((Path("run") / LORA_FILE).read_bytes())
            for job in trainer.push_in_progress.jobs:
                job.set_result(None)

    trainer.add_callback(End())
    trainer.train()
    assert written[0] == written[-1]  # nothing was written over what is being read
    assert len(hub.uploads) == 2
    assert same(load(hub.uploads[-1][1][LORA_FILE]), load_file(f"run/checkpoint-3/{LORA_FILE}"))


def test_the_end_strategy_writes_the_weights_once(make_trainer, hub, monkeypatch):
    trainer = make_trainer(hub_strategy="end", **OPTIONS)
    saved = []
    save = trainer.save_model
    monkeypatch.setattr(trainer, "save_model", lambda folder=None, **options: (saved.append(folder), save(folder, **options)))
    trainer.train()
    assert [folder for folder in saved if "checkpoint" not in str(folder)] == [None]
    assert len(hub.uploads) == 1


def test_what_is_half_written_or_superseded_is_not_uploaded(make_trainer, pipeline, hub):
    options = OPTIONS | {"push_to_hub": False}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options).train()
    resumed = make_trainer(sd_pipeline=pipeline, hub_strategy="end", **OPTIONS)
    resumed.train(resume_from_checkpoint="run/checkpoint-2")
    assert Path("run/_superseded-checkpoint-3").is_dir()
    Path("run/_incomplete-checkpoint-4/checkpoint-4").mkdir(parents=True)
    Path("run/_incomplete-checkpoint-4/checkpoint-4/optimizer.pt").write_bytes(b"half")
    resumed.push_to_hub()
    assert LORA_FILE in hub.uploads[-1][1]
    assert not [name for name in hub.uploads[-1][1] if "checkpoint-" in name]
