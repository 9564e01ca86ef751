"""Checkpoint folders without a trainer: complete or not there, found when damaged, kept and renamed."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlr_trainer.persistence.checkpoints import FILES_LIST, CheckpointError, CheckpointStore, check

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


class Harm:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def write(updates, **states):
    """A sealed checkpoint in the folder `run`; the keywords are contents of files of torch's."""
    store = CheckpointStore("run")
    with store.writing(updates) as aside:
        folder = aside / f"checkpoint-{updates}"
        folder.mkdir(parents=True)
        for name in ("state_0", "state_1"):
            (folder / f"{name}.bin").write_bytes(bytes(100) + name.encode())
        for name, state in states.items():
            torch.save(state, folder / f"{name}.pt")
    return store, store.folder / f"checkpoint-{updates}"


def names(store):
    return [path.name for path in store.checkpoints()]


def test_a_checkpoint_is_there_when_it_is_whole():
    store, folder = write(9)
    check(folder)
    (store.folder / "_incomplete-checkpoint-10").mkdir()  # of a run that was killed
    with store.writing(10) as aside:
        (aside / "checkpoint-10").mkdir(parents=True)
        assert names(store) == ["checkpoint-9"]
    assert names(store) == ["checkpoint-9", "checkpoint-10"]
    (folder / "old").touch()
    write(9)  # replaces the one of that name
    assert not (folder / "old").exists()
    assert not list(store.folder.glob("_*"))


def test_a_full_disk_is_said_and_leaves_nothing_half_written():
    """/dev/full fails as a full disk does, and torch reports it as an error of its own."""
    store, _ = write(1)

    def fill():
        with store.writing(2) as aside:
            (aside / "checkpoint-2").mkdir(parents=True)
            (aside / "checkpoint-2/optimizer.pt").symlink_to("/dev/full")
            torch.save(torch.zeros(100_000), aside / "checkpoint-2/optimizer.pt")

    with pytest.raises(OSError, match=r"cannot write run/checkpoint-2 .* GB are free there\. The run can go on from checkpoint-1"):
        fill()
    assert [path.name for path in store.folder.iterdir()] == ["checkpoint-1"]


def test_damage_of_any_file_is_found_by_its_name():
    _, folder = write(1, optimizer={"rate": 1.0})
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], b"", content[:-1] + bytes([content[-1] ^ 1])):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"{path.name} is damaged"):
                check(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"{path.name}.* is missing"):
            check(folder)
        path.write_bytes(content)
    check(folder)


@pytest.mark.medium
def test_every_bit_of_the_list_counts():
    """Among the flips are those that give two files one name, by which one of them would go unchecked."""
    _, folder = write(1)
    content = (folder / FILES_LIST).read_bytes()
    escaped = []
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (folder / FILES_LIST).write_bytes(flipped)
        try:
            check(folder)
        except CheckpointError as error:
            if str(folder) in str(error):
                continue
        escaped.append(place)
    assert len(content) > 200
    assert not escaped


@pytest.mark.parametrize("content", ["", "[]", '{"files": {}}', '{"format": 1, "files": []}', "[" * 100_000])
def test_what_is_no_list_is_damaged(content):
    _, folder = write(1)
    (folder / FILES_LIST).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{FILES_LIST} is damaged"):
        check(folder)


def test_a_list_names_no_file_outside():
    _, folder = write(1)
    Path("run/checkpoint-0").write_text("")
    text = (folder / FILES_LIST).read_text().replace("state_0.bin", "../checkpoint-0")
    (folder / FILES_LIST).write_text(text)
    with pytest.raises(CheckpointError, match="is damaged: it is no list as it is written"):
        check(folder)


@pytest.mark.parametrize("name", ["optimizer", "scheduler", "rng_state", "rlr_state"])
def test_a_file_that_would_run_code_is_passed_over_though_its_digest_fits(name, caplog):
    write(1, optimizer={"rate": 1.0})
    store, harmful = write(2, **{name: Harm()})
    with pytest.raises(CheckpointError, match=rf"{name}.pt cannot be read"):
        check(harmful)
    assert store.last_complete().name == "checkpoint-1"
    assert "passing over checkpoint-2: run/checkpoint-2/" in caplog.text
    assert not Path("harm").exists()


def test_nothing_complete_is_an_error():
    with pytest.raises(CheckpointError, match="'run' holds no complete checkpoint;"):
        CheckpointStore("run").last_complete()
    store, folder = write(1)
    (folder / FILES_LIST).unlink()
    with pytest.raises(CheckpointError, match=f"holds no complete checkpoint: .*{FILES_LIST}, which is written last, is missing"):
        store.last_complete()


@pytest.mark.parametrize(
    ("given", "message"),
    [("nowhere", "there is no such folder"), ("run", "a folder of them; give one, such as run/checkpoint-10")],
)
def test_a_folder_that_is_no_checkpoint(given, message):
    write(9)
    write(10)
    with pytest.raises(CheckpointError, match=f"{given} is not a complete checkpoint.*{message}"):
        check(Path(given))


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [8, 9, 10]),
        (2, None, [9, 10]),
        (2, "run/checkpoint-8", [8, 10]),
        (1, "run/checkpoint-8", [8, 10]),
    ],
)
def test_the_newest_and_the_best_are_kept(limit, best, kept):
    for updates in (8, 9, 10):
        store, _ = write(updates)
    store.rotate(limit, best)
    assert names(store) == [f"checkpoint-{updates}" for updates in kept]
    assert not list(store.folder.glob("_*"))


def test_later_checkpoints_are_renamed(caplog):
    for _ in range(2):
        for updates in (1, 2, 3):
            store, _ = write(updates)
        store.supersede(2)
    assert names(store) == ["checkpoint-1", "checkpoint-2"]
    assert sorted(path.name for path in store.folder.glob("_*")) == ["_superseded-checkpoint-3", "_superseded-checkpoint-3-2"]
    assert "run/checkpoint-3 lies past update 2" in caplog.text


def test_checkpoints_and_nothing_else_are_removed():
    store, _ = write(1)
    Path("run/checkpoint-1").rename("moved")
    Path("run/checkpoint-1").symlink_to("../moved")
    Path("run/checkpoint-notes.txt").write_text("mine")
    Path("run/checkpoint-mine").mkdir()
    write(2)
    store.remove_all()
    assert sorted(path.name for path in store.folder.iterdir()) == ["checkpoint-mine", "checkpoint-notes.txt"]
    check(Path("moved"))


def test_the_best_checkpoint_is_named_where_it_will_be_and_found_where_it_is(caplog):
    store, first = write(1)
    saved = []
    state = SimpleNamespace(global_step=2, best_global_step=2, best_model_checkpoint=str(first), save_to_json=saved.append)
    store.name_best(state, Path("run/_incomplete-checkpoint-2/checkpoint-2"), is_main=True)
    assert state.best_model_checkpoint == "run/checkpoint-2"  # and not where it is being written
    assert saved == ["run/_incomplete-checkpoint-2/checkpoint-2/trainer_state.json"]
    state = SimpleNamespace(best_global_step=1, best_model_checkpoint="elsewhere/checkpoint-1")
    store.find_best(state)
    assert state.best_model_checkpoint == "run/checkpoint-1"
    state = SimpleNamespace(best_global_step=7, best_model_checkpoint=None)
    store.find_best(state)
    assert state.best_model_checkpoint is None
    assert "run/checkpoint-7, is not there" in caplog.text
