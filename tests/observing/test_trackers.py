"""Metrics, pictures and hyper-parameters reach the trackers: read back from what they wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlr_trainer.observing.pictures import HookTracker, to_pictures

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture
def run(make_trainer):
    """A run of two updates with pictures of every update, a profile of the steps, and a hook that logs something of its own."""

    def hook(batches, step, tracker):
        tracker.log({"mine": 0.5 + step, "odd (name)": 1.0, "note": "a note"}, step=step)
        tracker.log_images({"my pictures": batches[0][0][:2]}, step=step)

    def train(report_to):
        trainer = make_trainer(
            report_to=report_to, image_samples_hook=hook, num_log_images=2, log_images_steps=1, log_step_norms=True, fo_steps=1,
            run_name="tracked",
        )  # fmt: skip
        trainer.train()
        return trainer

    return train


def test_tensorboard(run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = run("tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2]
    assert [event.value for event in events.Scalars("mine")] == [0.5, 1.5]
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert [event.value for event in events.Scalars("train/reward")] == pytest.approx(logged)
    steps = {tag for tag in tags["scalars"] if "step_grad_norm" in tag}
    assert steps == {f"train/estimator/step_grad_norm/{step}" for step in range(4)}
    assert all(event.value >= 0 for step in steps for event in events.Scalars(step))
    # TensorBoard keeps the pictures of one call as one tag each
    grids = [event for tag in tags["images"] if tag.startswith("samples") for event in events.Images(tag)]
    assert [event.step for event in grids] == [0, 1, 2]
    with Image.open(Path(trainer.args.output_dir) / "samples/step_000002.png") as grid:
        assert (grids[2].width, grids[2].height) == grid.size
    assert any(tag.startswith("my pictures") for tag in tags["images"])
    options = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert options["log_step_norms"] is True
    assert options["fo_steps"] == 1
    assert options["learning_rate"] == 1e-3


def test_step_norms_make_up_the_norms_of_the_parts(make_trainer):
    trainer = make_trainer(log_step_norms=True, estimator="full_bp", max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    steps = [row[f"estimator/step_grad_norm/{step}"] for step in range(4)]
    assert all(norm > 0 for norm in steps)
    assert max(steps) <= sum(steps)
    assert row["estimator/fo_grad_norm"] <= sum(steps) + 1e-6  # triangle inequality: the parts are sums over the steps
    assert not any("step_grad_norm" in name for name in make_trainer_row(make_trainer))


def make_trainer_row(make_trainer):
    trainer = make_trainer(max_steps=1, output_dir="plain")
    trainer.train()
    return trainer.state.log_history[0]


def test_without_a_tracker_hooks_write_files_and_the_log_writes_samples(run):
    trainer = run("none")
    folder = Path(trainer.args.output_dir)
    assert len(list(folder.glob("images/step_*/my_pictures.png"))) == 2
    assert not list(folder.glob("images/step_*/samples.png"))  # they are in samples/ already
    assert len(list(folder.glob("samples/step_*.json"))) == 3
    assert trainer.trackers().tracker is None


def test_wandb_offline(run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    try:
        run("wandb")
        summary = dict(wandb.run.summary)
        assert wandb.run.config["fo_steps"] == 1
    finally:
        wandb.finish()
    assert summary["mine"] == 1.5
    assert summary["note"] == "a note"
    assert "train/reward" in summary
    media = sorted(path.name for path in tmp_path.rglob("media/images/*.png"))
    assert sum(name.startswith("samples") for name in media) == 3
    assert sum(name.startswith("my pictures") for name in media) == 2 * 2


def test_trackio_local(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run("trackio")
    assert list((tmp_path / "trackio").rglob("*.db"))
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 3 + 2  # several pictures side by side


def test_mlflow_in_a_folder(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    address = f"file://{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions advise a database
    run("mlflow")
    client = mlflow.MlflowClient(address)
    (found,) = client.search_runs(["0"])
    assert found.data.params["fo_steps"] == "1"
    assert [metric.value for metric in client.get_metric_history(found.info.run_id, "mine")] == [0.5, 1.5]
    assert {"reward", "odd _name_"} <= found.data.metrics.keys()
    assert len(client.list_artifacts(found.info.run_id, "samples")) == 3


class Writer:
    def __init__(self):
        self.seen = []

    def add_scalar(self, name, value, global_step):
        self.seen.append((name, value, global_step))

    def add_text(self, name, value, global_step):
        self.seen.append((name, value, global_step))


def test_a_tracker_that_has_not_begun_is_left_alone(tmp_path):
    class Callback:
        _initialized = False
        _trackio = object()

    class Board:
        tb_writer = Writer()

    tracker = HookTracker([Callback(), Board()], tmp_path)
    tracker.log({"a": 1.0, "b": "text"}, step=3)
    assert tracker.tracker.seen == [("a", 1.0, 3), ("b", "text", 3)]
    assert HookTracker([Callback()], tmp_path).tracker is None


def test_calls_without_a_step_belong_to_the_update_of_the_hook(make_trainer):
    def hook(batches, step, tracker):
        tracker.log_images({"mine": batches[0][0]})

    trainer = make_trainer(image_samples_hook=hook, sample_num_steps=2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert sorted(str(path.relative_to(folder)) for path in folder.glob("images/*/*")) == [
        f"images/step_00000{step}/mine.png" for step in (0, 1)
    ]


def test_pictures_in_every_usual_form():
    image = torch.rand(3, 5, 7)
    last = image.permute(1, 2, 0)
    for value in (image, last, last.numpy(), image[None], [last.numpy()]):
        torch.testing.assert_close(to_pictures(value), image[None])
    eight_bit = (last * 255).round().to(torch.uint8).numpy()
    for value in (eight_bit, Image.fromarray(eight_bit)):
        torch.testing.assert_close(to_pictures(value), torch.as_tensor(np.array(eight_bit)).permute(2, 0, 1)[None] / 255)
    picture = Image.fromarray(eight_bit)
    grey = torch.as_tensor(np.array(picture.convert("L")))[None] / 255
    for value in (picture.convert("L"), np.array(picture.convert("L")), grey, grey[None], grey[0, :, :, None].numpy()):
        torch.testing.assert_close(to_pictures(value), grey.expand(1, 3, 5, 7))
    torch.testing.assert_close(to_pictures(np.array(picture.convert("RGBA"))), to_pictures(picture))
    torch.testing.assert_close(to_pictures([image, picture]), torch.cat([image[None], to_pictures(picture)]))
    assert to_pictures(torch.rand(2, 4, 3, 5, 7)).shape == (8, 3, 5, 7)  # frames of videos
    assert to_pictures(image > 0.5).max() == 1
    for wrong in (torch.rand(5), torch.rand(2, 5, 7), [image, image[:, :4]]):
        with pytest.raises(ValueError, match="pictures of the shape"):
            to_pictures(wrong)
