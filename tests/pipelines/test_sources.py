"""What is no folder and cannot be fetched is said at once."""

import time

import huggingface_hub
import pytest

from rlr_trainer.pipelines import load_pipeline, sources


@pytest.fixture
def online(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.chdir(tmp_path)


def test_a_name_that_is_no_hub_id_is_refused(online, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("nope", "runs/nope", "./a/b", "a/b/c", tmp_path / "nope"):
        with pytest.raises(ValueError, match="--lora=.*: no such folder; give a folder that exists, or a hub id, owner/name"):
            sources.check_source("--lora", name, "file")
    sources.check_source("--lora", tmp_path, "file")


def test_an_unreachable_hub_is_said_without_the_clients_retries(online, monkeypatch):
    started = time.monotonic()
    with pytest.raises(ValueError, match="sd_pipeline='owner/name'.*the hub cannot be reached.*hf download owner/name"):
        load_pipeline("owner/name")
    assert time.monotonic() - started < 2 * sources.SECONDS + 20
    monkeypatch.setattr(sources, "_unreachable", lambda endpoint: None)
    sources.check_source("--lora", "owner/name", "file")  # left to the hub client
