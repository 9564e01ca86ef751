"""Whether the folder of a run is free, and which one is taken where it is not."""

from pathlib import Path

import pytest

from rlr_trainer.persistence.checkpoints import CheckpointError
from rlr_trainer.persistence.output_folder import check_folder_to_go_on_in, free_folder, left_only_if_filled, run_in

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


def taken(name="run", log="mine"):
    folder = Path(name)
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(log)
    return folder


def test_what_says_that_a_run_lives_in_a_folder():
    folder = taken()
    assert run_in(folder) == "checkpoint-1, metrics.jsonl"
    (folder / "checkpoint-2").mkdir()
    (folder / "model_index.json").write_text("{}")
    assert run_in(folder) == "checkpoint-1, checkpoint-2, metrics.jsonl, ..."
    Path("failed").mkdir()
    Path("failed/metrics.jsonl").touch()  # before its first line: nothing is lost
    assert run_in(Path("failed")) == ""
    Path("notes").mkdir()
    Path("notes/run.yaml").touch()
    assert run_in(Path("notes")) == run_in(Path("nowhere")) == ""


def test_what_fails_leaves_no_empty_folder():
    def fails(name, file=None):
        with pytest.raises(ValueError), left_only_if_filled(Path(name)):
            Path(name).mkdir(parents=True, exist_ok=True)
            if file:
                Path(name, file).touch()
            raise ValueError

    Path("mine").mkdir()
    fails("mine")
    fails("mine/runs/new")
    assert Path("mine").is_dir() and not list(Path("mine").iterdir())
    fails("other/run", "metrics.jsonl")
    assert Path("other/run/metrics.jsonl").is_file()
    with left_only_if_filled(Path("done")):
        Path("done").mkdir()
    assert Path("done").is_dir()


def test_a_folder_that_was_asked_for_by_name_is_refused():
    with pytest.raises(ValueError, match=r"output_dir='run' holds another run \(checkpoint-1, metrics.jsonl\): .*overwrite=True"):
        free_folder(taken(), overwrite=False, trained_before=False, may_number=False)
    assert free_folder(Path("new"), overwrite=False, trained_before=False, may_number=False) == Path("new")


def test_a_default_folder_gets_a_number(caplog):
    taken("output")
    taken("output-2")
    assert free_folder(Path("output"), overwrite=False, trained_before=False, may_number=True) == Path("output-3")
    assert "this one goes to output-3; set output_dir" in caplog.text


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_that_may_be_replaced(overwrite, caplog):
    """`overwrite` removes its checkpoints; a second training of the same trainer writes over them."""
    folder = taken()
    assert free_folder(folder, overwrite, trained_before=True, may_number=False) == folder
    assert (folder / "checkpoint-1").is_dir() == (not overwrite)
    assert ("removing run/checkpoint-1" if overwrite else "training anew with the same trainer") in caplog.text


def test_a_run_s_folder_does_not_take_up_another_run():
    folder, other = taken(), taken("other")
    check_folder_to_go_on_in(folder, folder / "checkpoint-1", overwrite=False)
    check_folder_to_go_on_in(Path("new"), other / "checkpoint-1", overwrite=False)
    with pytest.raises(CheckpointError, match="cannot go on from other/checkpoint-1 in output_dir='run', which holds another run"):
        check_folder_to_go_on_in(folder, other / "checkpoint-1", overwrite=False)
    check_folder_to_go_on_in(folder, other / "checkpoint-1", overwrite=True)
    assert not (folder / "checkpoint-1").exists()
    assert (other / "checkpoint-1").is_dir()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, reason in (
        (tmp_path / "file", "file is a file"),
        (tmp_path / "file" / "run", "is a file"),
        (Path("/proc/run"), "cannot be"),
    ):
        with pytest.raises(ValueError, match=rf"output_dir=.*{reason}.*choose another folder"):
            free_folder(folder, False, False, False)
    free_folder(tmp_path / "new" / "run", False, False, False)
    assert not (tmp_path / "new").exists()
