"""Pictures of a run: the same prompts and noise before, during and after training, as PNG or GIF files and in the trackers."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from rlr_trainer.observing.clips import clip_bytes, frame_pictures, gif_bytes, pixels, strip_frames
from rlr_trainer.rewards.motion import mean_frame_difference

SAMPLES_FOLDER = "samples"
THUMBNAIL = 32  # side in pixels at which pictures are compared
TILE = (128, 256)  # least and largest width in pixels of a picture in a grid


@dataclasses.dataclass(frozen=True)
class FixedSamples:
    """N pictures, or videos, of fixed prompts and noise.

    Attributes:
        images: [N, 3, H, W] in [0, 1] (video: [N, F, 3, H, W]), on the CPU.
        prompts: N.
        rewards: [N], NaN where there is none.
    """

    images: Tensor
    prompts: Sequence[str]
    rewards: Tensor


class SampleLog(TrainerCallback):
    """Writes `samples/step_<updates>.json`, a grid beside it and the single pictures, and sends the grid to the trackers; of videos one
    that moves.

    Before the first update, every `every(updates of the run)` updates, and at the end, with the weights that the training ends with. It must
    come before the trackers' callbacks, which close when training ends.

    Args:
        sample: makes the pictures; called on every process.
        every: updates between two sets of pictures, of the number of updates of the run.
        seconds: training time so far.
        trackers: what to send grids to, as it is at that moment.
        stopped: whether the training was stopped from outside: then there is no time for pictures at the end.
    """

    def __init__(
        self,
        sample: Callable[[], FixedSamples],
        every: Callable[[int], int],
        seconds: Callable[[], float],
        trackers: Callable[[], Any],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.sample, self.every, self.seconds, self.trackers, self.stopped = sample, every, seconds, trackers, stopped
        self._last: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Removes the pictures that an earlier run took past the checkpoint that this one goes on from."""
        self._last = None
        if state.is_world_process_zero:
            remove_samples(Path(args.output_dir) / SAMPLES_FOLDER, state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and self._last is None:  # the trackers are set up by now
            self._take(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every(state.max_steps) == 0:
            self._take(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the last pictures, unless the last update has them or the run was stopped; of the best weights too, where they are loaded."""
        best_is_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not self.stopped() and (state.global_step != self._last or best_is_loaded):
            self._take(args, state)

    def _take(self, args: Any, state: Any) -> None:
        samples = self.sample()
        self._last = state.global_step
        if not state.is_world_process_zero:
            return
        texts = captions(samples.prompts, samples.rewards)
        grid, moving = picture_grid(samples.images, texts), clip_grid(samples.images, texts)
        write_samples(samples, grid, moving, Path(args.output_dir) / SAMPLES_FOLDER, state.global_step, self.seconds())
        trackers = self.trackers()
        if trackers.tracker is not None:
            shown = np.stack([np.asarray(frame) for frame in moving])[None] if moving else np.asarray(grid)
            trackers.log_images({"samples": shown}, step=state.global_step)


def remove_samples(folder: Path, after: int) -> None:
    """Removes what lies past the update `after`, or everything at 0: of another run in this folder, or of a time that is undone."""
    for path in folder.glob("step_*"):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and (after == 0 or int(number) > after):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_samples(samples: FixedSamples, grid: Any, moving: list[Any], folder: Path, step: int, seconds: float) -> None:
    """`step_<step>/000.png` (videos: .gif) and so on, `step_<step>.png` (the grid; its frames `moving` as .gif), and at last
    `step_<step>.json`, which lists them.
    """
    name = f"step_{step:06d}"
    files = write_pictures(samples.images, folder / name)
    grid.save(folder / f"{name}.png")
    if moving:
        (folder / f"{name}.gif").write_bytes(gif_bytes(moving))
    measured = {"diversity": diversity(samples.images, samples.prompts)}
    measured |= {"motion": mean_motion(samples.images)} if moving else {}
    record = {
        "step": step,
        "seconds": round(seconds, 3),
        "prompts": list(samples.prompts),
        "rewards": [None if math.isnan(reward) else reward for reward in samples.rewards.tolist()],
        **{metric: None if math.isnan(value) else value for metric, value in measured.items()},
        "files": [f"{name}/{file}" for file in files],
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_pictures(images: Tensor, folder: Path) -> list[str]:
    """Writes N pictures as 000.png, 001.png, ..., or videos as 000.gif, 001.gif, ...; returns the names."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:03d}.{'gif' if images.dim() == 5 else 'png'}" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        if image.dim() == 4:
            (folder / name).write_bytes(clip_bytes(image))
        else:
            Image.fromarray(pixels(image)).save(folder / name)
    return names


def mean_motion(videos: Tensor) -> float:
    """The mean of `mean_frame_difference` over videos [N, F, 3, H, W], without those that are not finite; NaN if none is left."""
    return float(mean_frame_difference(videos.float()).nanmean())


def captions(prompts: Sequence[str], rewards: Tensor) -> list[str]:
    """What stands under each picture: its reward, and its prompt."""
    values = ["no reward" if math.isnan(reward) else f"{reward:.4g}" for reward in rewards.tolist()]
    return [f"{value}\n{prompt}" for value, prompt in zip(values, prompts, strict=True)]


def clip_grid(images: Tensor, texts: Sequence[str]) -> list[Any]:
    """The frames, PIL pictures, of a grid of videos [N, F, 3, H, W] that move side by side; none of pictures [N, 3, H, W]."""
    return [picture_grid(images[:, number], texts) for number in range(images.shape[1])] if images.dim() == 5 else []


def picture_grid(images: Tensor, texts: Sequence[str]) -> Any:
    """One PIL picture of N, each with its text below; small ones enlarged without smoothing, large ones reduced. Videos: a strip of each.

    Args:
        images: [N, 3, H, W] in [0, 1], or [N, F, 3, H, W].
        texts: N; the first line and two of the rest are shown.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    is_video = images.dim() == 5
    images = images[:, strip_frames(images.shape[1])] if is_video else images[:, None]
    height, width = images.shape[-2:]
    factor = max(1, -(-TILE[0] // width)) if width < TILE[1] else TILE[1] / width
    size = (round(width * factor), round(height * factor))
    across = images.shape[1] * size[0]
    # matplotlib brings fonts with Greek, Cyrillic and more, which PIL's own lacks; letters of one width make wrapping a matter of counting
    font, line = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", 11), 15
    letters = int(across / font.getlength("x"))
    columns = 1 if is_video else math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    cell = (across + 8, size[1] + 8 + 3 * line)
    grid = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(grid)
    smooth = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    for number, (frames, text) in enumerate(zip(images, texts, strict=True)):
        x, y = number % columns * cell[0] + 4, number // columns * cell[1] + 4
        for place, picture in enumerate(frame_pictures(frames)):
            grid.paste(picture.resize(size, smooth), (x + place * size[0], y))
        first, _, rest = text.partition("\n")
        lines = [first[:letters], *textwrap.wrap(rest, letters, max_lines=2, placeholder="...")]
        draw.text((x, y + size[1]), "\n".join(lines), fill="black", font=font, spacing=line - 11)
    return grid


def thumbnails(images: Tensor) -> Tensor:
    """Pictures as vectors [N, D] for `diversity`: larger ones are averaged down to 32 x 32, smaller ones stay as they are."""
    height, width = (min(side, THUMBNAIL) for side in images.shape[-2:])
    flat = images.detach().float().flatten(1, -3)  # [N, channels (and frames), H, W]
    return torch.nn.functional.adaptive_avg_pool2d(flat, (height, width)).flatten(1)


def diversity(images: Tensor, prompts: Sequence[str]) -> float:
    """How much pictures of one prompt differ: 0 for copies; independent uniform noise gives 0.41. NaN without two of one prompt.

    The root mean square difference of the pixels of two pictures (of their `thumbnails`), averaged over the pairs of pictures that share
    a prompt, then over the prompts that have such pairs. Images are [N, 3, H, W] or [N, F, 3, H, W] in [0, 1].
    """
    return vector_diversity(thumbnails(images), prompts)


def vector_diversity(vectors: Tensor, prompts: Sequence[str]) -> float:
    """`diversity` of thumbnails [N, D]."""
    rows: dict[str, list[int]] = {}
    there = torch.isfinite(vectors).all(1).tolist()  # not those of a decoder that overflowed
    for number, prompt in ((number, prompt) for number, prompt in enumerate(prompts) if there[number]):
        rows.setdefault(prompt, []).append(number)
    means = [float(torch.pdist(vectors[numbers]).mean()) for numbers in rows.values() if len(numbers) > 1]
    return sum(means) / len(means) / vectors.shape[1] ** 0.5 if means else float("nan")
