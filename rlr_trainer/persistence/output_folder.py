"""The folder of a run: whether it is free, and another one where it need not be that one."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlr_trainer.persistence.checkpoints import CheckpointError, CheckpointStore

logger = logging.getLogger(__name__)

RUN_MARKS = ("checkpoint-*", "metrics.jsonl", "*.safetensors", "model_index.json")  # files that say that a run lives here


def run_in(folder: Path) -> str:
    """What says that a run lives in a folder; empty if nothing does."""
    found = (
        [path.name for mark in RUN_MARKS for path in sorted(folder.glob(mark)) if not _is_empty(path)] if folder.is_dir() else []
    )
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")


def _is_empty(path: Path) -> bool:
    """An empty file, such as the log of a run that failed before its first line: nothing is lost with it."""
    return path.is_file() and path.stat().st_size == 0


@contextlib.contextmanager
def left_only_if_filled(folder: Path) -> Iterator[None]:
    """What fails inside leaves no empty folder behind: `folder`, and those above it that were not there either, are removed again."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    done = False
    try:
        yield
        done = True
    finally:
        for path in () if done else absent:
            with contextlib.suppress(OSError):  # it holds something, or was never made
                path.rmdir()


def check_writable(folder: Path) -> None:
    """Refuses a folder in which no file can be made; makes none.

    Raises:
        ValueError: names what is in the way.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        reason = "is a file" if not there.is_dir() else f"cannot be written to ({error.strerror})"
    raise ValueError(f"output_dir={str(folder)!r}: {there} {reason}; choose another folder")


def free_folder(folder: Path, overwrite: bool, trained_before: bool, may_number: bool) -> Path:
    """The folder for a run that begins: `folder`, or one with a number if that is taken and nobody asked for it by name.

    With `overwrite` a run there may be replaced, and its checkpoints are removed; with `trained_before` it is one that this trainer did.

    Raises:
        ValueError: the folder holds another run, or cannot be written to.
    """
    check_writable(folder)
    found = run_in(folder)
    if not found:
        return folder
    if overwrite:
        CheckpointStore(folder).remove_all()
    elif trained_before:
        logger.warning("training anew with the same trainer: the logs in %s begin anew, and its checkpoints are replaced", folder)
    elif may_number:
        number = 2
        while run_in(numbered := folder.with_name(f"{folder.name}-{number}")):
            number += 1
        logger.warning(
            "%s holds another run (%s): this one goes to %s; set output_dir to choose the folder", folder, found, numbered
        )
        return numbered
    else:
        raise ValueError(
            f"output_dir={str(folder)!r} holds another run ({found}): choose another folder, continue it with "
            "train(resume_from_checkpoint=True), or allow overwriting with overwrite=True (--overwrite)"
        )
    return folder


def check_folder_to_go_on_in(folder: Path, checkpoint: Path, overwrite: bool) -> None:
    """Refuses to go on from another run's checkpoint in a folder that holds a run: its logs would be cut and mixed.

    Raises:
        CheckpointError: `folder` holds a run, the checkpoint is not in it, and `overwrite` is not set.
    """
    found = run_in(folder)
    if not found or checkpoint.resolve().is_relative_to(folder.resolve()):
        return
    if not overwrite:
        raise CheckpointError(
            f"cannot go on from {checkpoint} in output_dir={str(folder)!r}, which holds another run ({found}): choose another folder, "
            "continue that run with resume_from_checkpoint=True, or allow overwriting with overwrite=True (--overwrite)"
        )
    CheckpointStore(folder).remove_all()
