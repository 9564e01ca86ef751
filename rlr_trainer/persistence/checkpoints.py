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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

FILES_LIST = "rlr_files.json"
ASIDE = "_incomplete-checkpoint"
SUPERSEDED = "_superseded"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: incomplete, damaged, or of another kind of run."""


class CheckpointStore:
    """The checkpoint folders of a run, in its `folder`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
        return sorted(found, key=_updates)

    @contextlib.contextmanager
    def writing(self, updates: int, is_main: bool = True, wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
        """A folder to write `checkpoint-<updates>` in; at the end it is sealed and gets its name. Collective: `wait` waits for all.

        Raises:
            OSError: it cannot be written (a full disk); nothing half written is left.
        """
        aside, name = self.folder / f"{ASIDE}-{updates}", f"checkpoint-{updates}"
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_aside()
        wait()
        try:
            yield aside
            wait()
            if is_main:
                _seal(aside / name)
                _publish(aside / name, self.folder / name)
                self._remove_aside()
        except Exception as error:  # torch and safetensors report a full disk as errors of their own kinds
            shutil.rmtree(aside, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
            raise OSError(
                f"cannot write {self.folder / name} ({error}); {free / 1e9:.3g} GB are free there. "
                f"{self.way_on()}; make room, set save_total_limit, or choose another output_dir"
            ) from error

    def way_on(self) -> str:
        """What a run that ended can go on from, in words."""
        names = [path.name for path in self.checkpoints()]
        return f"The run can go on from {names[-1]}" if names else "No checkpoint was written before"

    def last_complete(self) -> Path:
        """The newest checkpoint that can be used; damaged ones are passed over with a warning.

        Raises:
            CheckpointError: there is none.
        """
        reasons = []
        for folder in reversed(self.checkpoints()):
            try:
                check(folder)
            except CheckpointError as error:
                logger.warning("passing over %s: %s", folder.name, error)
                reasons.append(str(error))
            else:
                return folder
        why = f": {reasons[0]}" if reasons else ""
        raise CheckpointError(
            f"resume_from_checkpoint=True, but {str(self.folder)!r} holds no complete checkpoint{why}; start anew in another folder, or set "
            "overwrite=True"
        )

    def rotate(self, limit: int | None, best: str | None) -> None:
        """Deletes the oldest checkpoints above `limit`, never the newest nor the best."""
        folders = self.checkpoints()
        if not folders or not limit or limit < 1:
            return
        kept = {folders[-1].resolve(), *([Path(best).resolve()] if best is not None else [])}
        spare = [folder for folder in folders if folder.resolve() not in kept]
        for folder in spare[: max(0, len(spare) + len(kept) - limit)]:
            doomed = folder.with_name(f"{ASIDE}-deleted-{folder.name}")
            os.rename(folder, doomed)  # so that a kill leaves nothing that looks whole
            with contextlib.suppress(OSError):  # the next save tries again
                _remove(doomed)

    def supersede(self, updates: int) -> None:
        """Renames the checkpoints past a number of updates: the run goes on from there, and they belong to a time that is undone."""
        for folder in self.checkpoints():
            if _updates(folder) <= updates:
                continue
            number, name = 1, f"{SUPERSEDED}-{folder.name}"
            while os.path.lexists(self.folder / name):
                number, name = number + 1, f"{SUPERSEDED}-{folder.name}-{number + 1}"
            os.rename(folder, self.folder / name)
            logger.warning("%s lies past update %d, from which this run goes on: it is now called %s", folder, updates, name)

    def remove_all(self) -> None:
        """Removes the checkpoints of an earlier run: a later resumption would take it up."""
        for folder in self.checkpoints():
            logger.warning("overwrite=True: removing %s of an earlier run", folder)
            _remove(folder)

    def name_best(self, state: Any, written: Path, is_main: bool) -> None:
        """Trainer looks for the best checkpoint beside the one it writes: gives it the place where it is, or will be."""
        if not state.best_global_step:
            return
        folder = self.folder / f"checkpoint-{state.best_global_step}"
        if folder.is_dir() or state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(folder)
        if is_main:
            state.save_to_json(str(written / "trainer_state.json"))

    def find_best(self, state: Any) -> None:
        """Gives a resumed run's best checkpoint the place where it is: the folder may have been moved or copied, whole or in part."""
        known = state.best_model_checkpoint
        if not state.best_global_step or (known is not None and Path(known).is_dir()):
            return
        folder = self.folder / f"checkpoint-{state.best_global_step}"
        state.best_model_checkpoint = str(folder) if folder.is_dir() else None
        if not folder.is_dir():
            logger.warning(
                "the best checkpoint so far, %s, is not there: load_best_model_at_end can load a better one alone", folder
            )

    def _remove_aside(self) -> None:
        """Removes what killed runs left half written."""
        for path in self.folder.glob(f"{ASIDE}-*"):
            with contextlib.suppress(OSError):
                _remove(path)


def check(folder: Path) -> None:
    """Compares a checkpoint with its list of files.

    Raises:
        CheckpointError: names the first file that is missing or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a complete checkpoint: there is no such folder; give one (checkpoint-*)")
    if inside := CheckpointStore(folder).checkpoints():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint but a folder of them; give one, such as {inside[-1]}, or make it output_dir and set "
            "resume_from_checkpoint=True"
        )
    for name, (size, digest) in _read_list(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; take an earlier checkpoint")
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{path} is damaged: {found} bytes, {size} were written; take an earlier checkpoint")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of what was written; take an earlier checkpoint")
        if path.parent == folder and path.suffix in (".pt", ".pth"):  # DeepSpeed's own files, in a folder below, hold objects
            _check_readable(path)


def _check_readable(path: Path) -> None:
    """Refuses a file of torch's that holds more than data; its tensors stay on the disk."""
    from transformers.trainer import safe_globals  # of the generator states that Trainer saves

    try:
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch reports damage in many ways
        raise CheckpointError(f"{path} cannot be read: {error}; take an earlier checkpoint") from error


def _read_list(folder: Path) -> dict[str, tuple[int, str]]:
    """The list of files: name -> (bytes, SHA-256)."""
    path = folder / FILES_LIST
    try:
        text = path.read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: {FILES_LIST}, which is written last, is missing; take an earlier one"
        ) from None
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); take an earlier checkpoint") from error
    wrong = [name for name in listed if not name.isprintable() or Path(name).is_absolute() or ".." in Path(name).parts]
    entries = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in listed.items()}
    if wrong or not listed or text != _list_text(entries):  # a name that stands there twice would leave a file unchecked
        raise CheckpointError(f"{path} is damaged: it is no list as it is written; take an earlier checkpoint")
    return listed


def _list_text(files: Mapping[str, Mapping[str, Any]]) -> str:
    return json.dumps({"format": 1, "files": files}, indent=1)


def _seal(folder: Path) -> None:
    """Writes the list of files, and makes everything in the folder durable."""
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != FILES_LIST:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    with open(folder / FILES_LIST, "w", encoding="utf-8") as file:
        file.write(_list_text(files))
        file.flush()
        os.fsync(file.fileno())


def _publish(written: Path, final: Path) -> None:
    """Gives a sealed folder its name; a checkpoint of the same update that already has it is replaced."""
    if final.exists():
        old = written.with_name(f"{written.name}-old")
        os.rename(final, old)
        os.rename(written, final)
        with contextlib.suppress(OSError):
            _remove(old)
    else:
        os.rename(written, final)
    with contextlib.suppress(OSError):  # not every file system lets a folder be synchronized
        descriptor = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """Removes a folder with all that is in it; of a link the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _updates(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
