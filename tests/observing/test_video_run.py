"""A run of a pipeline that makes videos: rewards on frames and of motion, clips in all its files, motion in its metrics."""

import json
from pathlib import Path

import pytest
from families.tiny.animatediff import SIZE, make_pipeline
from PIL import Image

from rlr_trainer import RLRConfig, RLRTrainer
from rlr_trainer.cli import main
from rlr_trainer.digits.rewards import ink
from rlr_trainer.observing.report import write_report
from rlr_trainer.rewards import FrameReward, enough_motion, jpeg_compressibility, motion_amount, motion_smoothness


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(trainer, folder, what the image hook got) of a run with a gradient through random frames."""
    folder, hooked = tmp_path_factory.mktemp("videos") / "run", []

    def hook(batches, step, tracker):
        hooked.append(tuple(batches[0][0].shape))
        tracker.log_images({"hooked": batches[0][0]}, step=step)

    config = RLRConfig(
        str(folder), estimator="rlr", fo_steps=1, sample_num_steps=3, sample_guidance_scale=1.0, per_device_train_batch_size=4, max_steps=2,
        lora_r=2, learning_rate=1e-2, num_log_images=2, log_images_steps=1, eval_strategy="steps", eval_steps=1, use_cpu=True,
        disable_tqdm=True, save_strategy="no", **SIZE,
    )  # fmt: skip
    rewards = [FrameReward(ink, 2, choice="random"), motion_smoothness, enough_motion(0.5)]
    trainer = RLRTrainer(
        config, rewards, lambda: ("a seven", {}), make_pipeline(), hook, eval_dataset=[{"prompt": "a seven"}, {"prompt": "an eight"}],
        eval_reward_function=[motion_amount, jpeg_compressibility],
    )  # fmt: skip
    trainer.train()
    trainer.save_pretrained(folder / "saved")
    return trainer, folder, hooked


@pytest.mark.medium
def test_motion_is_in_the_metrics(trained):
    trainer, _, _ = trained
    lines = [row for row in trainer.state.log_history if "reward" in row]
    assert [0 < row["motion"] < 1 for row in lines] == [True, True]
    for name in ("ink", "motion_smoothness", "enough_motion"):
        assert 0 < lines[0][f"rewards/{name}/mean"] <= 1
    evaluation = next(row for row in trainer.state.log_history if "eval_reward" in row)
    assert evaluation["eval_motion"] == pytest.approx(evaluation["eval_rewards/motion_amount/mean"])
    assert "motion" in trainer.parts.evaluator.metric_names(trainer.parts.eval_prompts, 1)


@pytest.mark.medium
def test_clips_are_in_the_files_the_hook_the_report_and_the_card(trained):
    trainer, folder, hooked = trained
    assert hooked == [(4, 3, 3, 16, 16)] * 2
    assert len(list((folder / "images/step_000000").glob("hooked_*.gif"))) == 4
    for step in range(3):
        record = json.loads((folder / f"samples/step_{step:06d}.json").read_text())
        assert record["motion"] > 0 and len(record["files"]) == 2
        for file in [*record["files"], f"step_{step:06d}.gif"]:
            with Image.open(folder / "samples" / file, formats=["GIF"]) as clip:
                assert clip.n_frames == 3
    page = write_report([folder], folder / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 2 * 3
    card = Path(folder, "saved/README.md").read_text()
    for words in (
        "text-to-video",
        " videos scored by `",
        "![Clips of fixed prompts after 2 updates",
        "num_frames=3).frames[0]\nexport_to_gif(frames, ",
    ):
        assert words in card, words
    assert (folder / "saved/clips.gif").read_bytes() == (folder / "samples/step_000002.gif").read_bytes()
    assert trainer.rewards.names == ["ink", "motion_smoothness", "enough_motion"]


def test_sampled_videos_are_clips(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rlr_trainer.cli.sample._load_model", lambda model, lora: make_pipeline())
    options = ["--num_steps", "2", "--guidance_scale", "1", "--height", "16", "--width", "16", "--num_frames", "4", "--use_cpu"]
    (tmp_path / "007.gif").touch()  # of an earlier call
    command = ["sample", "--model", "tiny", "--prompts", "a seven", "--num_images", "2", "--output_dir", str(tmp_path), *options]
    assert main(command) != 0
    assert "holds 1 pictures" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--reward", "frames:2:ink", "motion_amount"]) == 0
    assert "000.gif to 001.gif, grid.png and grid.gif" in capsys.readouterr().out
    files = {path.name for path in tmp_path.iterdir()}
    assert {"000.gif", "001.gif", "grid.gif", "grid.png", "rewards.json"} <= files and "007.gif" not in files
    with Image.open(tmp_path / "001.gif") as clip:
        assert clip.n_frames == 4
    assert json.loads((tmp_path / "rewards.json").read_text())["parts"]["motion_amount"][0] > 0


def test_a_reward_of_motion_refuses_pictures_before_the_training(make_trainer):
    with pytest.raises(ValueError, match=r"reward 'motion_amount': images has the shape \(4, 3, 32, 32\), but must be videos"):
        make_trainer(reward_function=motion_amount).train()
