"""Checkpoint folders that are complete or not there: written aside, listed with their digests, renamed; and checked before use.

A folder `checkpoint-<updates>` holds `FILES_LIST`, the size and SHA-256 of every other file in it. A run that is killed while it
writes leaves a folder `ASIDE-<updates>`, which the next save removes; a file that changed afterwards is found by its digest.
Checkpoints that lie past the one from which a run is resumed are renamed `SUPERSEDED-checkpoint-<updates>`. Names with "_" in
front are left out by Trainer when it pushes a folder to the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FILES_LIST = "rlr_files.json"
ASIDE = "_incomplete-checkpoint"
SUPERSEDED = "_superseded"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: incomplete, damaged, or of another kind of run."""


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in run_folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=_updates)


def _updates(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it; of a link the link alone.

    Raises:
        OSError: it cannot be removed.
    """
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def supersede(run_folder: Path, updates: int) -> None:
    """Renames the checkpoints past a number of updates: the run goes on from there, and they belong to a time that is undone."""
    for folder in list_checkpoints(run_folder):
        if _updates(folder) <= updates:
            continue
        number, name = 1, f"{SUPERSEDED}-{folder.name}"
        while os.path.lexists(run_folder / name):
            number, name = number + 1, f"{SUPERSEDED}-{folder.name}-{number + 1}"
        os.rename(folder, run_folder / name)
        logger.warning("%s lies past update %d, from which this run goes on: it is now called %s", folder, updates, name)


def aside(run_folder: Path, updates: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return run_folder / f"{ASIDE}-{updates}"


def remove_aside(run_folder: Path) -> None:
    """Removes what killed runs left half written."""
    for path in run_folder.glob(f"{ASIDE}-*"):
        with contextlib.suppress(OSError):
            remove(path)


def seal(folder: Path) -> None:
    """Writes the list of files, and makes everything in the folder durable."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != FILES_LIST:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    with open(folder / FILES_LIST, "w", encoding="utf-8") as file:
        json.dump({"format": 1, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def publish(written: Path, final: Path) -> None:
    """Gives a sealed folder its name; a checkpoint of the same update that already has it is replaced."""
    if final.exists():
        old = written.with_name(f"{written.name}-old")
        os.rename(final, old)
        os.rename(written, final)
        with contextlib.suppress(OSError):
            remove(old)
    else:
        os.rename(written, final)
    with contextlib.suppress(OSError):  # not every file system lets a folder be synchronized
        descriptor = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check(folder: Path) -> None:
    """Compares a checkpoint with its list of files.

    Raises:
        CheckpointError: names the first file that is missing or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: there is no such folder; give that of a checkpoint (checkpoint-*)"
        )
    if inside := list_checkpoints(folder):
        raise CheckpointError(
            f"{folder} is not a complete checkpoint but a folder of them; give one, such as {inside[-1]}, or make it output_dir and set "
            "resume_from_checkpoint=True"
        )
    try:
        files = json.loads((folder / FILES_LIST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: {FILES_LIST}, which is written last, is missing; take an earlier one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / FILES_LIST} is damaged ({error}); take an earlier checkpoint") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; take an earlier checkpoint")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path} is damaged: {size} bytes, {expected['bytes']} were written; take an earlier checkpoint")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of what was written; take an earlier checkpoint")


def last_complete(run_folder: Path) -> Path:
    """The newest checkpoint that can be used; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there is none.
    """
    reasons = []
    for folder in reversed(list_checkpoints(run_folder)):
        try:
            check(folder)
        except CheckpointError as error:
            logger.warning("passing over %s: %s", folder.name, error)
            reasons.append(str(error))
        else:
            return folder
    why = f": {reasons[0]}" if reasons else ""
    raise CheckpointError(
        f"resume_from_checkpoint=True, but {str(run_folder)!r} holds no complete checkpoint{why}; start anew in another folder, or set "
        "overwrite=True"
    )


def rotate(run_folder: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints above `limit`, never the newest nor the best."""
    if not limit or limit < 1:
        return
    folders = list_checkpoints(run_folder)
    kept = {folders[-1].resolve()} if folders else set()
    if best is not None:
        kept.add(Path(best).resolve())
    for folder in reversed(folders):
        if len(kept) < limit:
            kept.add(folder.resolve())
    for folder in folders:
        if folder.resolve() not in kept:
            doomed = folder.with_name(f"{ASIDE}-deleted-{folder.name}")
            os.rename(folder, doomed)  # so that a kill leaves nothing that looks whole
            with contextlib.suppress(OSError):  # the next save tries again
                remove(doomed)


def find_best(run_folder: Path, state: Any) -> None:
    """Gives a resumed run's best checkpoint the place where it is: the run's folder may have been moved or copied, whole or in part.

    Args:
        run_folder: the present one.
        state: Trainer's; `best_model_checkpoint` is set.
    """
    known = state.best_model_checkpoint
    if not state.best_global_step or (known is not None and Path(known).is_dir()):
        return
    folder = run_folder / f"checkpoint-{state.best_global_step}"
    state.best_model_checkpoint = str(folder) if folder.is_dir() else None
    if not folder.is_dir():
        logger.warning("the best checkpoint so far, %s, is not there: load_best_model_at_end can load a better one alone", folder)
