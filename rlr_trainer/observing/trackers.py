"""The run's trackers with the methods of accelerate's: for image hooks, and for `trainer.accelerator.log`.

Trainer's callbacks set the trackers up and close them; here they are looked up in the callbacks at every call.
"""

from __future__ import annotations

import io
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import GeneralTracker, on_main_process
from torch import Tensor

from rlr_trainer.observing.clips import clip_bytes, pixels, strips

logger = logging.getLogger(__name__)

LOGGED_FILE = "logged.jsonl"


class RunTracker(GeneralTracker):
    """A tracker of the run, with the methods of an accelerate tracker. Its subclasses say how one package takes values and pictures.

    Args:
        callback: Trainer's integration, which sets the tracker up when training begins and holds it in `attribute`.
        step: gives the updates so far, for calls that name no step.
    """

    requires_logging_directory = False
    attribute: str

    def __init__(self, callback: Any, step: Callable[[], int]) -> None:
        super().__init__()
        self._callback, self._step = callback, step

    @property
    def package(self) -> Any:
        """The package with the tracker's functions; of TensorBoard the writer."""
        return getattr(self._callback, self.attribute)

    @property
    def tracker(self) -> Any:
        """The underlying run or writer; None while it is not set up."""
        raise NotImplementedError

    run = writer = property(lambda self: self.tracker)  # as accelerate calls those of Weights & Biases, and of TensorBoard

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Logs numbers and texts by name; several numbers, such as a batch's rewards, as a histogram, and dicts of them as "name/key".

        Args:
            step: updates so far; None: those of the run.
        """
        self._send(self._log, _flat(values), step)

    @on_main_process
    def log_images(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Logs pictures by name: [3, H, W] or [N, 3, H, W] in [0, 1], or channels last (array, tensor or PIL); see `to_pictures`.

        Videos [N, F, 3, H, W] become animated GIFs.
        """
        shown = {name: to_pictures(value) for name, value in values.items()}
        for method, dimensions in ((self._log_images, 4), (self._log_clips, 5)):
            if some := {name: batch for name, batch in shown.items() if batch.dim() == dimensions}:
                self._send(method, some, step)

    def log_table(self, table_name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int | None = None) -> None:
        """Logs a table of rows `data`; as Markdown where the tracker has no tables."""
        self.log({table_name: self._table(list(columns), list(data))}, step=step)

    def _send(self, method: Callable[[dict[str, Any], int], None], values: dict[str, Any], step: int | None) -> None:
        if self.tracker is not None:
            method(values, self._step() if step is None else step)
        else:
            text = "%s has not begun or is closed: %s not logged; Trainer sets trackers up when training begins"
            logger.warning(text, self.name, ", ".join(values))

    def _log(self, values: dict[str, Any], step: int) -> None:
        """Takes numbers, arrays of several numbers, and anything else, as a text."""
        raise NotImplementedError

    def _log_images(self, pictures: dict[str, Tensor], step: int) -> None:
        raise NotImplementedError

    def _log_clips(self, videos: dict[str, Tensor], step: int) -> None:
        """Takes videos [N, F, 3, H, W]; as strips where this is all that the tracker can show."""
        self._log_images({name: strips(batch) for name, batch in videos.items()}, step)

    def _table(self, columns: list[str], data: list[Any]) -> Any:
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [columns, ["---"] * len(columns), *data])


class TensorBoard(RunTracker):
    """A `SummaryWriter`."""

    name, attribute = "tensorboard", "tb_writer"
    tracker = property(lambda self: self.package)

    def _log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                self.tracker.add_histogram(name, value, global_step=step)
            elif isinstance(value, int | float):
                self.tracker.add_scalar(name, value, global_step=step)
            else:
                self.tracker.add_text(name, str(value), global_step=step)
        self.tracker.flush()

    def _log_images(self, pictures: dict[str, Tensor], step: int) -> None:
        for name, batch in pictures.items():
            self.tracker.add_images(name, batch, global_step=step)

    def _log_clips(self, videos: dict[str, Tensor], step: int) -> None:
        try:  # as `SummaryWriter.add_video`, which needs moviepy
            from tensorboard.compat.proto.summary_pb2 import Summary
        except ImportError:  # a writer of tensorboardX
            return super()._log_clips(videos, step)
        for name, video in _single(videos).items():
            height, width = video.shape[-2:]
            clip = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=clip_bytes(video))
            self.tracker.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=clip)]), step)
        self.tracker.flush()


class WandB(RunTracker):
    """A run of Weights & Biases. Its own step counts calls and refuses numbers behind it: the updates are a value, as Trainer logs them."""

    name, attribute = "wandb", "_wandb"
    tracker = property(lambda self: self.package.run)

    def _log(self, values: dict[str, Any], step: int) -> None:
        self.package.log(values | {"train/global_step": step})

    def _log_images(self, pictures: dict[str, Tensor], step: int) -> None:
        self._log({name: self._panel(batch) for name, batch in pictures.items()}, step)

    def _panel(self, batch: Tensor) -> Any:
        return [self.package.Image(pixels(picture)) for picture in batch]

    def _log_clips(self, videos: dict[str, Tensor], step: int) -> None:
        clips = {name: [io.BytesIO(clip_bytes(video)) for video in batch] for name, batch in videos.items()}
        self._log({name: [self.package.Video(clip, format="gif") for clip in batch] for name, batch in clips.items()}, step)

    def _table(self, columns: list[str], data: list[Any]) -> Any:
        return self.package.Table(columns=columns, data=data)  # cells may be pictures and the like


class Trackio(WandB):
    """A run of Trackio, whose functions are those of Weights & Biases. Several pictures are one, side by side."""

    name, attribute = "trackio", "_trackio"
    tracker = property(lambda self: self.package.context_vars.current_run.get() if self._callback._initialized else None)

    def _panel(self, batch: Tensor) -> Any:
        return self.package.Image(pixels(batch))

    def _log_clips(self, videos: dict[str, Tensor], step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:  # Trackio copies the files
            single = enumerate(_single(videos).items())
            paths = {name: _write_clip(video, Path(folder), str(number)) for number, (name, video) in single}
            self._log({name: self.package.Video(str(path), format="gif") for name, path in paths.items()}, step)


class MLflow(RunTracker):
    """A run of MLflow. What is no single number becomes a file."""

    name, attribute = "mlflow", "_ml_flow"
    tracker = property(lambda self: self.package.active_run())

    def _log(self, values: dict[str, Any], step: int) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        # MLflow refuses some characters in the name of a metric; Trainer replaces them in its own
        metrics = {re.sub(r"[^\w\-. :/]", "_", name): float(number) for name, number in numbers.items()}
        self.package.log_metrics(metrics, step=step)
        for name in values.keys() - numbers.keys():
            self.package.log_text(str(values[name]), f"{_file_name(name)}/step_{step:06d}.txt")

    def _log_images(self, pictures: dict[str, Tensor], step: int) -> None:
        for name, batch in pictures.items():
            self.package.log_image(pixels(batch), artifact_file=f"{_file_name(name)}/step_{step:06d}.png")

    def _log_clips(self, videos: dict[str, Tensor], step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, video in _single(videos).items():
                self.package.log_artifact(str(_write_clip(video, Path(folder), f"step_{step:06d}")), _file_name(name))


class Files(RunTracker):
    """For runs without a tracker: lines of `logged.jsonl`, and pictures in `images/`, in the run's folder, which stands for the callback."""

    name = "files"
    tracker = None

    def _send(self, method: Callable[[dict[str, Any], int], None], values: dict[str, Any], step: int | None) -> None:
        method(values, self._step() if step is None else step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        line = json.dumps(
            {"step": step} | values, default=lambda value: value.tolist() if isinstance(value, np.ndarray) else str(value)
        )
        self._callback.mkdir(parents=True, exist_ok=True)
        with open(self._callback / LOGGED_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(json.loads(line, parse_constant=lambda _: None)) + "\n")  # JSON has no NaN: it becomes null

    def _log_images(self, pictures: dict[str, Tensor], step: int) -> None:
        from PIL import Image

        folder = self._callback / "images" / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, batch in pictures.items():
            Image.fromarray(pixels(batch)).save(folder / f"{_file_name(name)}.png")

    def _log_clips(self, videos: dict[str, Tensor], step: int) -> None:
        folder = self._callback / "images" / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, video in _single(videos).items():
            _write_clip(video, folder, name)


def trackers_of(callbacks: Sequence[Any], folder: Path, step: Callable[[], int]) -> list[RunTracker]:
    """One tracker for each of Trainer's integrations among the callbacks that this library knows, TensorBoard first; `Files` where there
    is none."""
    # TensorBoard's writer is None before and after the training, the packages of the others are there as long as they can be imported
    found = [
        kind(callback, step)
        for kind in (TensorBoard, WandB, Trackio, MLflow)
        for callback in callbacks
        if hasattr(callback, kind.attribute) and (kind is TensorBoard or getattr(callback, kind.attribute) is not None)
    ]
    return found or [Files(folder, step)]


def connect_accelerator(accelerator: Any, callbacks: Sequence[Any], folder: Path, step: Callable[[], int]) -> None:
    """Makes `accelerator.log`, `accelerator.trackers` and `accelerator.get_tracker(name)` reach the run's trackers.

    May be called again, after an integration was added. The arguments are those of `trackers_of`.
    """
    others = [tracker for tracker in accelerator.trackers if not isinstance(tracker, RunTracker)]
    accelerator.trackers[:] = [*others, *trackers_of(callbacks, folder, step)]


class HookTracker:
    """The run's trackers as one, for image hooks: `log`, `log_images` and `log_table` go to all of them, and to files where there is none.

    Everything else, such as `tracker`, `name`, `run` and `writer`, is that of the first.

    Args:
        callbacks: Trainer's callbacks, among them its integrations.
        folder: the run's output folder.
        step: updates so far, for calls that name no step.
    """

    def __init__(self, callbacks: Sequence[Any], folder: Path, step: int = 0) -> None:
        ready = [tracker for tracker in trackers_of(callbacks, folder, lambda: step) if tracker.tracker is not None]
        self.trackers: list[RunTracker] = ready or [Files(folder, lambda: step)]

    def __getattr__(self, name: str) -> Any:
        if name == "trackers":  # before __init__, as when unpickled
            raise AttributeError(name)
        if name not in ("log", "log_images", "log_table"):
            return getattr(self.trackers[0], name)

        def log_to_all(*args: Any, **kwargs: Any) -> None:
            for tracker in self.trackers:
                getattr(tracker, name)(*args, **kwargs)

        return log_to_all


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dicts inside become entries of their own, "name/key"; what holds numbers becomes a Python number or, of several, an array."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": inner for key, inner in _flat(value).items()}
        elif isinstance(value, int | float | list | tuple | np.ndarray | np.generic | Tensor):
            array = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
            flat[name] = value if array.dtype.kind not in "biuf" or not array.size else array.item() if array.size == 1 else array
        else:
            flat[name] = value
    return flat


def _file_name(name: str) -> str:
    return re.sub(r"[^\w-]", "_", name)[:100]


def _single(videos: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Videos [F, 3, H, W] by name; where a name has several, their number follows it."""
    numbered = {name: len(batch) > 1 for name, batch in videos.items()}
    return {f"{name}/{i}" if numbered[name] else name: video for name, batch in videos.items() for i, video in enumerate(batch)}


def _write_clip(video: Tensor, folder: Path, name: str) -> Path:
    path = folder / f"{_file_name(name)}.gif"
    path.write_bytes(clip_bytes(video))
    return path


def to_pictures(value: Any) -> Tensor:
    """One or several pictures as float [N, 3, H, W] in [0, 1], or videos as [N, F, 3, H, W].

    Args:
        value: a tensor, array, PIL picture or sequence of them; [H, W], [C, H, W] or [H, W, C], or a batch of these; or videos
            [N, F, C, H, W] or [N, F, H, W, C]. C is 3, 1 (grey) or 4 (RGBA, whose last is left out). Integers are out of 255.

    Raises:
        ValueError: another shape, or pictures of several sizes.
    """
    if isinstance(value, list | tuple):
        parts = [to_pictures(part) for part in value]
        shapes = [tuple(part.shape[1:]) for part in parts]
        if len(set(shapes)) != 1:
            raise ValueError(f"pictures of the shapes {shapes}: log those of one size under one name")
        return torch.cat(parts)
    if not isinstance(value, Tensor):  # PIL's convert: the numbers of a palette are not colours
        value = torch.as_tensor(np.array(value.convert("RGB") if hasattr(value, "convert") else value))
    scale = 1 if value.is_floating_point() or value.dtype == torch.bool else 255
    array = value.detach().cpu().float() / scale
    videos = array.shape[:-3] if array.dim() == 5 else None
    array = array.flatten(0, -4) if array.dim() > 3 else array[None] if array.dim() == 3 else array[None, ..., None]
    places = [axis for channels in (3, 1, 4) for axis in (1, 3) if array.dim() == 4 and array.shape[axis] == channels]
    if not places:
        raise ValueError(
            f"pictures of the shape {tuple(value.shape)}: must be [3, H, W], [N, 3, H, W], [N, F, 3, H, W], or with the channels last"
        )
    array = array.movedim(places[0], 1)[:, :3].expand(-1, 3, -1, -1)
    return array if videos is None else array.unflatten(0, videos)
