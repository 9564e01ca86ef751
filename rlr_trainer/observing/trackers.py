"""The run's trackers with the methods of accelerate's: for image hooks, and for `trainer.accelerator.log`.

Trainer's callbacks set the trackers up and close them; here they are looked up in the callbacks at every call.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import GeneralTracker, on_main_process
from torch import Tensor

from rlr_trainer.observing.pictures import pixels

logger = logging.getLogger(__name__)

LOGGED_FILE = "logged.jsonl"
_MLFLOW_REFUSES = re.compile(r"[^\w\-. :/]")  # in the name of a metric; Trainer replaces it in its own


class RunTracker(GeneralTracker):
    """A tracker of the run, with the methods of an accelerate tracker.

    Args:
        callback: Trainer's integration, which sets the tracker up when training begins.
        step: gives the updates so far, for calls that name no step.
    """

    requires_logging_directory = False

    def __init__(self, callback: Any, step: Callable[[], int]) -> None:
        super().__init__()
        self._callback, self._step = callback, step

    @property
    def tracker(self) -> Any:
        """The underlying run or writer; None while it is not set up."""
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether it can take anything."""
        return self.tracker is not None

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs numbers and texts by name; several numbers, such as a batch's rewards, as a histogram, and dicts of them as "name/key".

        Args:
            step: updates so far; None: those of the run.
            kwargs: for the tracker's own method.
        """
        self._send(self._log, _flat(values), step, kwargs)

    @on_main_process
    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs pictures by name: [3, H, W] or [N, 3, H, W] in [0, 1], or channels last (array, tensor or PIL); see `to_pictures`."""
        self._send(self._log_images, {name: to_pictures(value) for name, value in values.items()}, step, kwargs)

    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Logs a table, given as `columns` and rows `data` or as a `dataframe`; as Markdown where the tracker has no tables.

        Raises:
            ValueError: neither is given.
        """
        if dataframe is not None:
            columns, data = list(dataframe.columns), dataframe.to_numpy().tolist()
        if columns is None or data is None:
            raise ValueError(f"log_table({table_name!r}): has no content; pass columns and data, or dataframe")
        lines = [columns, ["---"] * len(columns), *data]
        text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        self.log({table_name: text}, step=step, **kwargs)

    def _send(self, method: Callable[..., None], values: dict[str, Any], step: int | None, kwargs: dict[str, Any]) -> None:
        if self.ready:
            method(values, self._step() if step is None else step, **kwargs)
        else:
            text = "%s has not begun or is closed: %s not logged; Trainer sets trackers up when training begins"
            logger.warning(text, self.name, ", ".join(values))

    def _log(self, values: dict[str, Any], step: int, **kwargs: Any) -> None:
        raise NotImplementedError

    def _log_images(self, pictures: dict[str, Tensor], step: int, **kwargs: Any) -> None:
        raise NotImplementedError


class TensorBoard(RunTracker):
    """A `SummaryWriter`."""

    name = "tensorboard"

    @property
    def tracker(self) -> Any:
        return self._callback.tb_writer

    @property
    def writer(self) -> Any:
        """As accelerate calls it."""
        return self.tracker

    def _log(self, values: dict[str, Any], step: int, **kwargs: Any) -> None:
        for name, value in values.items():
            numbers = _numbers(value)
            if numbers is None:
                self.writer.add_text(name, str(value), global_step=step, **kwargs)
            elif numbers.size == 1:
                self.writer.add_scalar(name, numbers.item(), global_step=step, **kwargs)
            else:
                self.writer.add_histogram(name, numbers, global_step=step, **kwargs)
        self.writer.flush()

    def _log_images(self, pictures: dict[str, Tensor], step: int, **kwargs: Any) -> None:
        for name, batch in pictures.items():
            self.writer.add_images(name, batch, global_step=step, **kwargs)


class WandB(RunTracker):
    """A run of Weights & Biases. Its own step counts calls and refuses numbers behind it: the updates are a value, as Trainer logs them."""

    name = "wandb"

    @property
    def tracker(self) -> Any:
        return self._callback._wandb.run

    @property
    def run(self) -> Any:
        """As accelerate calls it."""
        return self.tracker

    @on_main_process
    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Logs a `wandb.Table`, whose cells may be pictures and the like."""
        table = self._callback._wandb.Table(columns=columns, data=data, dataframe=dataframe)
        self.log({table_name: table}, step=step, **kwargs)

    def _log(self, values: dict[str, Any], step: int, **kwargs: Any) -> None:
        self.run.log(values | {"train/global_step": step}, **kwargs)

    def _log_images(self, pictures: dict[str, Tensor], step: int, **kwargs: Any) -> None:
        image = self._callback._wandb.Image
        self._log({name: [image(pixels(picture)) for picture in batch] for name, batch in pictures.items()}, step, **kwargs)


class Trackio(RunTracker):
    """A run of Trackio."""

    name = "trackio"

    @property
    def tracker(self) -> Any:
        return self._callback._trackio.context_vars.current_run.get() if self._callback._initialized else None

    def _log(self, values: dict[str, Any], step: int, **kwargs: Any) -> None:
        self._callback._trackio.log(values | {"train/global_step": step}, **kwargs)

    def _log_images(self, pictures: dict[str, Tensor], step: int, **kwargs: Any) -> None:
        image = self._callback._trackio.Image
        self._log({name: image(side_by_side(batch)) for name, batch in pictures.items()}, step, **kwargs)


class MLflow(RunTracker):
    """A run of MLflow. What is no single number becomes a file."""

    name = "mlflow"

    @property
    def tracker(self) -> Any:
        return self._callback._ml_flow.active_run()

    def _log(self, values: dict[str, Any], step: int, **kwargs: Any) -> None:
        arrays = {name: _numbers(value) for name, value in values.items()}
        numbers = {name: array.item() for name, array in arrays.items() if array is not None and array.size == 1}
        metrics = {_MLFLOW_REFUSES.sub("_", name): float(number) for name, number in numbers.items()}
        self._callback._ml_flow.log_metrics(metrics, step=step, **kwargs)
        for name in values.keys() - numbers.keys():
            self._callback._ml_flow.log_text(str(values[name]), f"{file_name(name)}/step_{step:06d}.txt")

    def _log_images(self, pictures: dict[str, Tensor], step: int, **kwargs: Any) -> None:
        for name, batch in pictures.items():
            place = f"{file_name(name)}/step_{step:06d}.png"
            self._callback._ml_flow.log_image(side_by_side(batch), artifact_file=place, **kwargs)


class Files(RunTracker):
    """For runs without a tracker: lines of `logged.jsonl`, and pictures in `images/`.

    Args:
        folder: the run's output folder.
    """

    name = "files"

    def __init__(self, folder: Path, step: Callable[[], int]) -> None:
        super().__init__(None, step)
        self.folder = folder

    @property
    def tracker(self) -> Any:
        return None

    @property
    def ready(self) -> bool:
        return True

    def _log(self, values: dict[str, Any], step: int, **kwargs: Any) -> None:
        arrays = {name: _numbers(value) for name, value in values.items()}
        line = {name: str(values[name]) if array is None else array.tolist() for name, array in arrays.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / LOGGED_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan({"step": step} | line)) + "\n")

    def _log_images(self, pictures: dict[str, Tensor], step: int, **kwargs: Any) -> None:
        from PIL import Image

        folder = self.folder / "images" / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, batch in pictures.items():
            Image.fromarray(side_by_side(batch)).save(folder / f"{file_name(name)}.png")


_BY_ATTRIBUTE: dict[str, type[RunTracker]] = {"tb_writer": TensorBoard, "_wandb": WandB, "_trackio": Trackio, "_ml_flow": MLflow}


def trackers_of(callbacks: Sequence[Any], folder: Path, step: Callable[[], int]) -> list[RunTracker]:
    """One tracker for each of Trainer's integrations among the callbacks that this library knows; `Files` where there is none.

    Args:
        callbacks: Trainer's, integrations among them; TensorBoard comes first.
        folder: the run's output folder.
        step: gives the updates so far.
    """
    # TensorBoard's writer is None before and after the training, the modules of the others are there as long as they can be imported
    found = [
        kind(callback, step)
        for attribute, kind in _BY_ATTRIBUTE.items()
        for callback in callbacks
        if hasattr(callback, attribute) and (kind is TensorBoard or getattr(callback, attribute) is not None)
    ]
    return found or [Files(folder, step)]


def connect_accelerator(accelerator: Any, callbacks: Sequence[Any], folder: Path, step: Callable[[], int]) -> None:
    """Makes `accelerator.log`, `accelerator.trackers` and `accelerator.get_tracker(name)` reach the run's trackers.

    Trainer's callbacks keep setting them up and closing them. May be called again, after an integration was added.

    Args:
        accelerator: the trainer's; its list `trackers` changes.
        callbacks, folder, step: see `trackers_of`.
    """
    others = [tracker for tracker in accelerator.trackers if not isinstance(tracker, RunTracker)]
    accelerator.trackers[:] = [*others, *trackers_of(callbacks, folder, step)]


class HookTracker:
    """The run's trackers as one, for image hooks: what it is given goes to all of them, and to files where there is none.

    Everything else, such as `tracker`, `name`, `run` of Weights & Biases or `writer` of TensorBoard, is that of the first.

    Args:
        callbacks: Trainer's callbacks, among them its integrations.
        folder: the run's output folder.
        step: updates so far, for calls that name no step.
    """

    def __init__(self, callbacks: Sequence[Any], folder: Path, step: int = 0) -> None:
        files = Files(folder, lambda: step)
        self.trackers = [tracker for tracker in trackers_of(callbacks, folder, lambda: step) if tracker.ready] or [files]

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """See `RunTracker.log`; `kwargs` are for the first tracker."""
        self._all("log", values, step=step, **kwargs)

    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """See `RunTracker.log_images`; `kwargs` are for the first tracker."""
        self._all("log_images", values, step=step, **kwargs)

    def log_table(self, table_name: str, *args: Any, **kwargs: Any) -> None:
        """See `RunTracker.log_table`."""
        for tracker in self.trackers:
            tracker.log_table(table_name, *args, **kwargs)

    def _all(self, method: str, values: Mapping[str, Any], step: int | None, **kwargs: Any) -> None:
        for tracker in self.trackers:
            getattr(tracker, method)(values, step=step, **(kwargs if tracker is self.trackers[0] else {}))

    def __getattr__(self, name: str) -> Any:
        if name == "trackers":  # before __init__, as when unpickled
            raise AttributeError(name)
        return getattr(self.trackers[0], name)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dicts inside become entries of their own, "name/key"; tensors become arrays."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": inner for key, inner in _flat(value).items()}
        else:
            flat[name] = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else value
    return flat


def _numbers(value: Any) -> np.ndarray | None:
    """A number, or a list or array of them; None for a text or another object."""
    if isinstance(value, bool | int | float | list | tuple | np.ndarray | np.generic):
        array = np.asarray(value)
        return array if array.dtype.kind in "biuf" and array.size else None
    return None


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def file_name(name: str) -> str:
    """A name as that of a file."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:100]


def side_by_side(pictures: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [0, 1] -> bytes [H, N * W, 3]."""
    return pixels(torch.cat(list(pictures), dim=2))


def to_pictures(value: Any) -> Tensor:
    """One or several pictures as float [N, 3, H, W] in [0, 1].

    Args:
        value: a tensor, array, PIL picture or sequence of them; [H, W], [C, H, W] or [H, W, C], or a batch of these; of a video's frames
            [N, F, C, H, W] each counts. C is 3, 1 (grey) or 4 (RGBA, whose last is left out). Integers are out of 255.

    Raises:
        ValueError: another shape, or pictures of several sizes.
    """
    if isinstance(value, list | tuple):
        parts = [to_pictures(part) for part in value]
        if len({part.shape[1:] for part in parts}) != 1:
            raise ValueError(
                f"pictures of the shapes {[tuple(part.shape) for part in parts]}: log those of one size under one name"
            )
        return torch.cat(parts)
    if not isinstance(value, Tensor):  # PIL's convert: the numbers of a palette are not colours
        value = torch.as_tensor(np.array(value.convert("RGB") if hasattr(value, "convert") else value))
    array = value.detach().cpu()
    if not array.is_floating_point() and array.dtype != torch.bool:
        array = array.float() / 255
    array = array.float()
    shape = tuple(array.shape)
    array = array[..., None] if array.dim() == 2 else array
    array = array[None] if array.dim() == 3 else array.flatten(0, 1) if array.dim() == 5 else array
    places = [(channels, axis) for channels in (3, 1, 4) for axis in (1, 3) if array.dim() == 4 and array.shape[axis] == channels]
    if not places:
        raise ValueError(f"pictures of the shape {shape}: must be [3, H, W], [N, 3, H, W], or the same with the channels last")
    channels, axis = places[0]
    array = array.movedim(axis, 1)
    return array.expand(-1, 3, -1, -1) if channels == 1 else array[:, :3]
