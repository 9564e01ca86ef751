"""Metrics, pictures and hyper-parameters reach the trackers: read back from what they wrote."""

import io
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from rlr_trainer.observing.trackers import HookTracker, connect_accelerator, to_pictures

pytestmark = pytest.mark.usefixtures("in_temporary_folder")

CLIPS = (torch.arange(2 * 4)[:, None, None, None] % 5 / 4).expand(8, 3, 4, 6).unflatten(0, (2, 4))
PICTURES = torch.linspace(0, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)


def begun(name, output_dir="run", begin=True):
    """Trainer's own integration, as it is once training has begun."""
    callback = getattr(integration_utils, name)()
    arguments = TrainingArguments(output_dir=output_dir, report_to="none", use_cpu=True, run_name="tracked")
    if begin:
        callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=torch.nn.Linear(1, 1))
    return callback


def use(tracker):
    """What scripts written for accelerate's trackers do with one."""
    for step in (0, 1):
        tracker.log({"mine": 0.5 + step, "odd (name)": 1.0, "note": "a note", "nested": {"rewards": torch.arange(3.0)}}, step=step)
        tracker.log_images({"my pictures": PICTURES, "my clips": CLIPS}, step=step)
    tracker.log_images({"one clip": CLIPS[:1].movedim(2, -1).numpy()}, step=1)
    tracker.log_table("my table", columns=["prompt", "reward"], data=[["a panda", 0.5]], step=1)


def frames_of(source):
    with Image.open(source, formats=["GIF"]) as clip:
        return clip.n_frames, clip.size


def scalars_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.fixture
def tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))  # transformers 4 does not know it, and writes to output_dir
    return tmp_path


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    yield wandb
    wandb.finish()


@pytest.mark.medium
def test_a_run_with_tensorboard(make_trainer, tensorboard):
    """Metrics, pictures of the fixed prompts, options, and what a hook logs, which belongs to the updates so far."""

    def hook(batches, step, tracker):
        tracker.log_images({"my pictures": batches[0][0][:2]})
        tracker.log({"mine": 0.5 + step})

    options = {"num_log_images": 2, "log_images_steps": 1, "log_step_norms": True, "fo_steps": 1}
    trainer = make_trainer(report_to="tensorboard", image_samples_hook=hook, **options)
    trainer.train()
    events = scalars_of(tensorboard)
    tags = events.Tags()
    assert [(event.step, event.value) for event in events.Scalars("mine")] == [(0, 0.5), (1, 1.5)]
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert [event.value for event in events.Scalars("train/reward")] == pytest.approx(logged)
    steps = {tag for tag in tags["scalars"] if "step_grad_norm" in tag}
    assert steps == {f"train/estimator/step_grad_norm/{step}" for step in range(4)}
    grids = [event for tag in tags["images"] if tag.startswith("samples") for event in events.Images(tag)]
    assert [event.step for event in grids] == [0, 1, 2]
    with Image.open(Path(trainer.args.output_dir) / "samples/step_000002.png") as grid:
        assert (grids[2].width, grids[2].height) == grid.size
    assert any(tag.startswith("my pictures") for tag in tags["images"])
    written = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert (written["log_step_norms"], written["fo_steps"], written["learning_rate"]) == (True, 1, 1e-3)


@pytest.mark.medium
def test_step_norms_make_up_the_norms_of_the_parts(make_trainer):
    trainer = make_trainer(log_step_norms=True, estimator="full_bp", max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    steps = [row[f"estimator/step_grad_norm/{step}"] for step in range(4)]
    assert all(norm > 0 for norm in steps)
    assert max(steps) <= sum(steps)
    assert row["estimator/fo_grad_norm"] <= sum(steps) + 1e-6  # triangle inequality: the parts are sums over the steps


def test_tensorboard(tensorboard, tmp_path):
    callback = begun("TensorBoardCallback")
    tracker = HookTracker([callback], tmp_path)
    use(tracker)
    tracker.writer.add_scalar("by hand", 2.0, global_step=7)
    assert tracker.tracker is tracker.writer is callback.tb_writer and tracker.name == "tensorboard"
    tracker.writer.flush()
    events = scalars_of(tensorboard)
    assert [(event.step, event.value) for event in events.Scalars("mine")] == [(0, 0.5), (1, 1.5)]
    assert events.Scalars("by hand")[0].value == 2.0
    assert events.Histograms("nested/rewards")[0].histogram_value.num == 3
    assert events.Tensors("note/text_summary")[0].tensor_proto.string_val == [b"a note"]
    assert b"| a panda | 0.5 |" in events.Tensors("my table/text_summary")[0].tensor_proto.string_val[0]
    pictures = [event for tag in events.Tags()["images"] if tag.startswith("my pictures") for event in events.Images(tag)]
    assert [event.step for event in pictures] == [0, 1]  # several pictures are one grid
    for name, steps in {"my clips/0": [0, 1], "my clips/1": [0, 1], "one clip": [1]}.items():
        clips = events.Images(name)
        assert [(event.step, event.width, event.height) for event in clips] == [(step, 6, 4) for step in steps]
        assert frames_of(io.BytesIO(clips[0].encoded_image_string)) == (4, (6, 4))


@pytest.mark.medium
def test_wandb_offline(wandb, tmp_path):
    tracker = HookTracker([begun("WandbCallback")], tmp_path)
    use(tracker)
    assert tracker.tracker is tracker.run is wandb.run and tracker.name == "wandb"
    assert tracker.tracker.step >= 5  # calls; the updates are a value
    tracker.tracker.log({"by hand": 2.0})
    tracker.log_table("pictures", ["picture"], [[wandb.Image(np.zeros((4, 4, 3), dtype=np.uint8))]])
    summary = dict(wandb.run.summary)
    assert (summary["mine"], summary["note"], summary["by hand"], summary["train/global_step"]) == (1.5, "a note", 2.0, 0)
    assert summary["my table"]["_type"] == summary["pictures"]["_type"] == "table-file"
    assert sum(path.name.startswith("my pictures") for path in tmp_path.rglob("media/images/*.png")) == 2 * 2
    clips = list(tmp_path.rglob("media/videos/*.gif"))
    assert sorted(path.name.split("_")[0] for path in clips) == ["my clips"] * 4 + ["one clip"]
    assert {frames_of(path) for path in clips} == {(4, (6, 4))}


def test_trackio_local(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    callback = begun("TrackioCallback")
    tracker = HookTracker([callback], tmp_path)
    assert tracker.name == "trackio" and tracker.tracker.name == "tracked"
    use(tracker)
    callback._trackio.finish()
    assert list((tmp_path / "trackio").rglob("*.db"))
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 2  # several pictures side by side
    assert [frames_of(path) for path in (tmp_path / "trackio").rglob("*.gif")] == [(4, (6, 4))] * 5


@pytest.mark.medium
def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    address = f"file://{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions advise a database
    tracker = HookTracker([begun("MLflowCallback")], tmp_path)
    use(tracker)
    run = tracker.tracker.info.run_id
    mlflow.end_run()
    client = mlflow.MlflowClient(address)
    assert [metric.value for metric in client.get_metric_history(run, "mine")] == [0.5, 1.5]
    assert "odd _name_" in client.get_run(run).data.metrics
    assert [file.path for file in client.list_artifacts(run, "my_table")] == ["my_table/step_000001.txt"]
    assert len(client.list_artifacts(run, "my_pictures")) == 2
    assert [file.path for file in client.list_artifacts(run, "one_clip")] == ["one_clip/step_000001.gif"]
    assert len(client.list_artifacts(run, "my_clips_1")) == 2


def test_without_a_tracker_what_is_logged_becomes_files(tmp_path):
    tracker = HookTracker([begun("TensorBoardCallback", begin=False)], tmp_path / "new", step=3)
    use(tracker)
    tracker.log({"bad": float("nan")})
    assert tracker.tracker is None
    lines = [json.loads(line) for line in (tmp_path / "new/logged.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "mine": 0.5, "odd (name)": 1.0, "note": "a note", "nested/rewards": [0.0, 1.0, 2.0]}
    assert lines[-1] == {"step": 3, "bad": None}
    with Image.open(tmp_path / "new/images/step_000001/my_pictures.png") as picture:
        assert picture.size == (2 * 5, 4)
    folder = tmp_path / "new/images/step_000001"
    assert sorted(path.name for path in folder.glob("*.gif")) == ["my_clips_0.gif", "my_clips_1.gif", "one_clip.gif"]
    assert frames_of(folder / "my_clips_1.gif") == (4, (6, 4))


def test_a_writer_that_takes_pictures_alone_gets_strips(monkeypatch, tensorboard, tmp_path):
    """As that of tensorboardX, which has messages of its own."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.summary_pb2", None)
    tracker = HookTracker([begun("TensorBoardCallback")], tmp_path)
    tracker.log_images({"one clip": CLIPS[:1]}, step=1)
    tracker.writer.flush()
    monkeypatch.undo()
    (strip,) = scalars_of(tensorboard).Images("one clip")
    assert (strip.width, strip.height) == (4 * 6, 4)


@pytest.mark.medium
def test_the_accelerator_reaches_the_trackers_of_the_run(tensorboard, wandb, tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    board, bias = (begun(name, begin=False) for name in ("TensorBoardCallback", "WandbCallback"))
    for _ in range(2):  # the second time changes nothing
        connect_accelerator(accelerator, [board, bias], tmp_path, lambda: 4)
    with caplog.at_level(logging.WARNING, logger="rlr_trainer"):
        accelerator.log({"early": 1.0})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "tensorboard has not begun or is closed",
        "wandb has not begun or is closed",
    ]
    arguments = TrainingArguments(output_dir="run", report_to="none", use_cpu=True)
    for callback in (board, bias):
        callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=torch.nn.Linear(1, 1))
    accelerator.log({"a": 1.0})
    accelerator.log({"a": 2.0}, step=5)
    assert [(event.step, event.value) for event in scalars_of(tensorboard).Scalars("a")] == [(4, 1.0), (5, 2.0)]
    assert accelerator.get_tracker("wandb", unwrap=True) is wandb.run
    assert wandb.run.summary["a"] == 2.0
    accelerator.trackers[0].finish()  # as accelerator.end_training() does: Trainer closes them
    assert board.tb_writer is not None


def test_an_accelerator_without_a_tracker_writes_a_file(tmp_path):
    accelerator = Accelerator(cpu=True)
    connect_accelerator(accelerator, [], tmp_path, lambda: 0)
    accelerator.log({"a": 1.0}, step=2)
    assert json.loads((tmp_path / "logged.jsonl").read_text()) == {"step": 2, "a": 1.0}


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
    video = torch.rand(2, 4, 3, 5, 7)
    for value in (video, video.movedim(2, -1).numpy(), [video[:1], video[1:]]):
        torch.testing.assert_close(to_pictures(value), video)
    assert to_pictures(image > 0.5).max() == 1
    for wrong in (torch.rand(5), torch.rand(2, 5, 7), [image, image[:, :4]]):
        with pytest.raises(ValueError, match="pictures of the shape"):
            to_pictures(wrong)
