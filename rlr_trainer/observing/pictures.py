"""Pictures of a run: the same prompts and noise before, during and after training, as PNG files and in the trackers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

SAMPLES_FOLDER = "samples"
THUMBNAIL = 32  # side in pixels at which pictures are compared
TILE = (128, 256)  # least and largest width in pixels of a picture in a grid


@dataclasses.dataclass(frozen=True)
class FixedSamples:
    """N pictures of fixed prompts and noise.

    Attributes:
        images: [N, 3, H, W] in [0, 1] (video: [N, F, 3, H, W]), on the CPU.
        prompts: N.
        rewards: [N], NaN where there is none.
    """

    images: Tensor
    prompts: Sequence[str]
    rewards: Tensor


class SampleLog(TrainerCallback):
    """Writes `samples/step_<updates>.json`, a grid beside it and the single pictures, and sends the grid to the trackers.

    Before the first update, every `every` updates, and at the end, with the weights that the training ends with. It must come before
    the trackers' callbacks, which close when training ends.

    Args:
        sample: makes the pictures; called on every process.
        every: updates between two, or None for the beginning and the end alone.
        seconds: training time so far.
        trackers: what to send grids to, as it is at that moment.
        stopped: whether the training was stopped from outside: then there is no time for pictures at the end.
    """

    def __init__(
        self,
        sample: Callable[[], FixedSamples],
        every: int | None,
        seconds: Callable[[], float],
        trackers: Callable[[], Any],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.sample, self.every, self.seconds, self.trackers, self.stopped = sample, every, seconds, trackers, stopped
        self._last: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = None
        if state.is_world_process_zero:
            remove_samples(Path(args.output_dir) / SAMPLES_FOLDER, state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and self._last is None:  # the trackers are set up by now
            self._take(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._take(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best_is_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not self.stopped() and (state.global_step != self._last or best_is_loaded):
            self._take(args, state)

    def _take(self, args: Any, state: Any) -> None:
        samples = self.sample()
        self._last = state.global_step
        if not state.is_world_process_zero:
            return
        grid = picture_grid(samples.images, captions(samples.prompts, samples.rewards))
        write_samples(samples, grid, Path(args.output_dir) / SAMPLES_FOLDER, state.global_step, self.seconds())
        trackers = self.trackers()
        if trackers.tracker is not None:
            trackers.log_images({"samples": np.asarray(grid)}, step=state.global_step)


def remove_samples(folder: Path, after: int) -> None:
    """Removes what lies past the update `after`, or everything at 0: of another run in this folder, or of a time that is undone."""
    for path in folder.glob("step_*"):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and (after == 0 or int(number) > after):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_samples(samples: FixedSamples, grid: Any, folder: Path, step: int, seconds: float) -> None:
    """`step_<step>/000.png` and so on, `step_<step>.png` (the grid), and at last `step_<step>.json`, which lists them."""
    name = f"step_{step:06d}"
    files = write_pictures(samples.images, folder / name)
    grid.save(folder / f"{name}.png")
    value = diversity(samples.images, samples.prompts)
    record = {
        "step": step,
        "seconds": round(seconds, 3),
        "prompts": list(samples.prompts),
        "rewards": [None if math.isnan(reward) else reward for reward in samples.rewards.tolist()],
        "diversity": None if math.isnan(value) else value,
        "files": [f"{name}/{file}" for file in files],
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_pictures(images: Tensor, folder: Path) -> list[str]:
    """Writes N pictures as 000.png, 001.png, ...; the frames of a video side by side. Returns the names."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:03d}.png" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        frames = image if image.dim() == 4 else image[None]
        Image.fromarray(_pixels(torch.cat(list(frames), dim=-1))).save(folder / name)
    return names


def _pixels(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> bytes [H, W, 3]."""
    return (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def captions(prompts: Sequence[str], rewards: Tensor) -> list[str]:
    """What stands under each picture: its reward, and its prompt."""
    values = ["no reward" if math.isnan(reward) else f"{reward:.4g}" for reward in rewards.tolist()]
    return [f"{value}\n{prompt}" for value, prompt in zip(values, prompts, strict=True)]


def picture_grid(images: Tensor, texts: Sequence[str]) -> Any:
    """One PIL picture of N, each with its text below; small ones enlarged without smoothing, large ones reduced. Video: the middle frame.

    Args:
        images: [N, 3, H, W] in [0, 1], or [N, F, 3, H, W].
        texts: N; a line that is too wide is wrapped, and cut after two lines.
    """
    from PIL import Image, ImageDraw

    images = images[:, images.shape[1] // 2] if images.dim() == 5 else images
    height, width = images.shape[-2:]
    factor = max(1, -(-TILE[0] // width)) if width < TILE[1] else TILE[1] / width
    size = (round(width * factor), round(height * factor))
    font, line = _font(), 15
    columns = math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    cell = (size[0] + 8, size[1] + 8 + 3 * line)
    grid = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(grid)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = number % columns * cell[0] + 4, number // columns * cell[1] + 4
        smooth = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
        grid.paste(Image.fromarray(_pixels(image)).resize(size, smooth), (x, y))
        for row, part in enumerate(_fit(text, font, size[0])):
            draw.text((x, y + size[1] + row * line), part, fill="black", font=font)
    return grid


def _fit(text: str, font: Any, width: int) -> list[str]:
    """At most three lines: the text's first, and two of the rest."""
    first, _, rest = text.partition("\n")
    lines, words = [""], " ".join(rest.split()).split(" ")
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 2:
        lines = [lines[0], f"{lines[1]}..."]
    return [_cut(part, font, width) for part in (first, *lines)]


def _cut(text: str, font: Any, width: int) -> str:
    while font.getlength(text) > width and len(text) > 1:
        text = text[:-4] + "..." if len(text) > 4 else text[:-1]
    return text


def _font() -> Any:
    """The sans-serif font that matplotlib brings: it has Greek, Cyrillic and more, which PIL's own lacks."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 11)


def thumbnails(images: Tensor) -> Tensor:
    """Pictures as vectors [N, D] for `diversity`: larger ones are averaged down to 32 x 32, smaller ones stay as they are."""
    height, width = (min(side, THUMBNAIL) for side in images.shape[-2:])
    flat = images.detach().float().flatten(1, -3)  # [N, channels (and frames), H, W]
    return torch.nn.functional.adaptive_avg_pool2d(flat, (height, width)).flatten(1)


def diversity(images: Tensor, prompts: Sequence[str]) -> float:
    """How much pictures of one prompt differ: 0 for copies; independent uniform noise gives 0.41. NaN without two of one prompt.

    The root mean square difference of the pixels of two pictures (of their thumbnails, see `thumbnails`), averaged over the pairs of
    pictures that share a prompt, then over the prompts that have such pairs.

    Args:
        images: [N, 3, H, W] or [N, F, 3, H, W] in [0, 1].
        prompts: N.
    """
    return vector_diversity(thumbnails(images), prompts)


def vector_diversity(vectors: Tensor, prompts: Sequence[str]) -> float:
    """`diversity` of thumbnails [N, D]."""
    rows: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(number)
    means = [float(torch.pdist(vectors[numbers]).mean()) for numbers in rows.values() if len(numbers) > 1]
    return sum(means) / len(means) / vectors.shape[1] ** 0.5 if means else float("nan")


# ---- trackers ----

_MLFLOW_REFUSES = re.compile(r"[^\w\-. :/]")  # in the name of a metric; Trainer replaces it in its own


class HookTracker:
    """The run's trackers behind one face: TensorBoard, Weights & Biases, Trackio and MLflow, as Trainer's callbacks set them up.

    It has the methods of an accelerate tracker that DDPO's image hooks use. Without a tracker, pictures become PNG files in the folder.

    Args:
        callbacks: Trainer's callbacks, among them its integrations.
        folder: the run's output folder.
        step: updates so far, for calls that name no step.
    """

    def __init__(self, callbacks: Sequence[Any], folder: Path, step: int = 0) -> None:
        self._writers = [c.tb_writer for c in callbacks if getattr(c, "tb_writer", None) is not None]
        self._wandb = _ready(callbacks, "_wandb", lambda wandb, callback: wandb.run is not None)
        self._trackio = _ready(callbacks, "_trackio", lambda trackio, callback: callback._initialized)
        self._mlflow = _ready(callbacks, "_ml_flow", lambda mlflow, callback: mlflow.active_run() is not None)
        self.folder, self.step = folder, step

    @property
    def tracker(self) -> Any:
        """The first underlying tracker, or None."""
        others = [module for module in (self._wandb, self._trackio, self._mlflow) if module is not None]
        return next(iter([*self._writers, *others]), None)

    @property
    def name(self) -> str | None:
        """What accelerate calls the first tracker ("tensorboard", "wandb", "trackio" or "mlflow"), or None."""
        named = {"tensorboard": self._writers, "wandb": self._wandb, "trackio": self._trackio, "mlflow": self._mlflow}
        return next((name for name, tracker in named.items() if tracker), None)

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs numbers and texts by name; several numbers, such as a batch's rewards, as a histogram, and dicts of them as "name/key"."""
        step = self.step if step is None else step
        values = _flat(values)
        for writer in self._writers:
            for name, value in values.items():
                if isinstance(value, str):
                    writer.add_text(name, value, global_step=step)
                elif np.size(value) == 1:
                    writer.add_scalar(name, np.asarray(value).item(), global_step=step)
                else:
                    writer.add_histogram(name, np.asarray(value), global_step=step)
        for module in (self._wandb, self._trackio):
            if module is not None:
                module.log(dict(values) | _axis(step))
        if self._mlflow is not None:
            texts = {name: value for name, value in values.items() if isinstance(value, str)}
            numbers = {_MLFLOW_REFUSES.sub("_", name): float(v) for name, v in values.items() if name not in texts}
            self._mlflow.log_metrics(numbers, step=step)
            for name, text in texts.items():
                self._mlflow.log_text(text, f"{_file_name(name)}/step_{step:06d}.txt")

    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs pictures by name: [3, H, W] or [N, 3, H, W] in [0, 1], or channels last (array, tensor or PIL)."""
        step = self.step if step is None else step
        pictures = {name: to_pictures(value) for name, value in values.items()}
        for writer in self._writers:
            for name, batch in pictures.items():
                writer.add_images(name, batch, global_step=step)
        if self._wandb is not None:
            panels = {n: [self._wandb.Image(_pixels(p)) for p in batch] for n, batch in pictures.items()}
            self._wandb.log(panels | _axis(step))
        rows = {name: _pixels(torch.cat(list(batch), dim=2)) for name, batch in pictures.items()}  # side by side
        if self._trackio is not None:
            self._trackio.log({name: self._trackio.Image(row) for name, row in rows.items()} | _axis(step))
        if self._mlflow is not None:
            for name, row in rows.items():
                self._mlflow.log_image(row, artifact_file=f"{_file_name(name)}/step_{step:06d}.png")
        if self.tracker is None:
            self._save(rows, step)

    def _save(self, rows: Mapping[str, np.ndarray], step: int) -> None:
        from PIL import Image

        folder = self.folder / "images" / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, row in rows.items():
            Image.fromarray(row).save(folder / f"{_file_name(name)}.png")


def _ready(callbacks: Sequence[Any], attribute: str, is_ready: Callable[[Any, Any], bool]) -> Any:
    """The tracker's module that a callback of Trainer's holds, once its run has begun."""
    found = [(getattr(c, attribute), c) for c in callbacks if getattr(c, attribute, None) is not None]
    return next((module for module, callback in found if is_ready(module, callback)), None)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dicts inside become entries of their own, "name/key"; tensors become arrays."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": inner for key, inner in _flat(value).items()}
        else:
            flat[name] = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else value
    return flat


def _axis(step: int) -> dict[str, int]:
    """The step as Trainer logs it: these trackers count their own calls, and refuse numbers behind that count."""
    return {"train/global_step": step}


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:100]


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
