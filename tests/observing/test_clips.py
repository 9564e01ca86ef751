"""Videos in a run's files and in the grids."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from rlr_trainer.observing.clips import MILLISECONDS, STRIP_FRAMES, clip_bytes, strip_frames, strips
from rlr_trainer.observing.pictures import FixedSamples, clip_grid, mean_motion, picture_grid, remove_samples, write_samples


def moving(frames=5, size=16, videos=2):
    """Clips of few colours: a bright bar that moves."""
    clip = torch.zeros(videos, frames, 3, size, size)
    for number in range(frames):
        clip[:, number, :, :, number % size] = 1
    return clip


def frames_of(data):
    with Image.open(io.BytesIO(data), formats=["GIF"]) as opened:
        assert opened.info["loop"] == 0
        found = []
        for number in range(opened.n_frames):
            opened.seek(number)
            found.append((np.asarray(opened.convert("RGB")), opened.info["duration"]))
        return found


def test_a_gif_shows_every_frame():
    clip = moving()[0]
    found = frames_of(clip_bytes(clip))
    assert [duration for _, duration in found] == [MILLISECONDS] * 5
    for (picture, _), frame in zip(found, clip, strict=True):
        np.testing.assert_array_equal(picture, (frame * 255).permute(1, 2, 0).numpy())
    frozen = frames_of(clip_bytes(clip[:1].expand(5, -1, -1, -1)))
    assert [duration for _, duration in frozen] == [5 * MILLISECONDS]


def test_strips_show_frames_from_the_first_to_the_last():
    assert strip_frames(3) == [0, 1, 2] and strip_frames(1) == [0]
    shown = strip_frames(81)
    assert (len(shown), shown[0], shown[-1]) == (STRIP_FRAMES, 0, 80)
    videos = torch.rand(2, 20, 3, 4, 6)
    strip = strips(videos)
    assert strip.shape == (2, 3, 4, STRIP_FRAMES * 6)
    assert torch.equal(strip[1, :, :, -6:], videos[1, 19])


def test_the_grid_of_videos_is_one_strip_each_and_moves():
    videos = moving(frames=4, size=32, videos=3)
    grid = picture_grid(videos, ["one", "two", "three"])
    assert grid.size == (4 * 128 + 8, 3 * (128 + 8 + 45))
    frames = clip_grid(videos, ["one", "two", "three"])
    assert len(frames) == 4 and {frame.size for frame in frames} == {picture_grid(videos[:, 0], ["one", "two", "three"]).size}
    assert not np.array_equal(np.asarray(frames[0]), np.asarray(frames[1]))
    assert clip_grid(videos[:, 0], ["one", "two", "three"]) == []


def test_samples_of_videos_are_gifs_with_their_motion(tmp_path):
    videos = moving(frames=4, size=32)
    texts = ["one", "two"]
    samples = FixedSamples(videos, texts, torch.tensor([0.5, float("nan")]))
    write_samples(samples, picture_grid(videos, texts), clip_grid(videos, texts), tmp_path, 3, 1.0)
    record = json.loads((tmp_path / "step_000003.json").read_text())
    assert record["files"] == ["step_000003/000.gif", "step_000003/001.gif"]
    assert record["motion"] == pytest.approx(2 / 32)  # two columns of 32 change by 1
    assert len(frames_of((tmp_path / record["files"][0]).read_bytes())) == 4
    assert len(frames_of((tmp_path / "step_000003.gif").read_bytes())) == 4
    with Image.open(tmp_path / "step_000003.png") as grid:
        assert grid.size[0] == 4 * 128 + 8
    remove_samples(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_motion_leaves_out_what_is_not_finite():
    videos = moving(frames=4, size=32)
    broken = videos.clone()
    broken[1, 2, 0, 0, 0] = float("nan")
    assert mean_motion(broken) == pytest.approx(mean_motion(videos[:1]))
    assert np.isnan(mean_motion(broken[1:]))
