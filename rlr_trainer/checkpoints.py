"""Checkpoint folders that are complete or not there: written aside, listed with their digests, renamed; and checked before use.

A folder `checkpoint-<updates>` holds `FILES_LIST`, the size and SHA-256 of every other file in it. A run that is killed while it
writes leaves a folder `ASIDE-<updates>`, which the next save removes; a file that changed afterwards is found by its digest.
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

logger = logging.getLogger(__name__)

FILES_LIST = "rlr_files.json"
ASIDE = ".incomplete-checkpoint"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: incomplete, damaged, or of another kind of run."""


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in run_folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def aside(run_folder: Path, updates: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return run_folder / f"{ASIDE}-{updates}"


def remove_aside(run_folder: Path) -> None:
    """Removes what killed runs left half written."""
    for path in run_folder.glob(f"{ASIDE}-*"):
        shutil.rmtree(path, ignore_errors=True)


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
    """Gives a sealed folder its name; a checkpoint that already has it (of a run resumed from before it) is replaced."""
    if final.exists():
        old = written.with_name(f"{written.name}-old")
        os.rename(final, old)
        os.rename(written, final)
        shutil.rmtree(old, ignore_errors=True)
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
            shutil.rmtree(doomed, ignore_errors=True)
