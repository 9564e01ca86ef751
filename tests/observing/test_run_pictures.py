"""Pictures that a run takes of itself, and their diversity."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from rlr_trainer import digits
from rlr_trainer.observing.pictures import diversity, picture_grid, thumbnails

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture
def make_trainer(make_trainer):
    """Shorter chains: what is tested here does not depend on their length."""
    return lambda **options: make_trainer(**({"sample_num_steps": 2} | options))


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def record(folder, step):
    return json.loads((Path(folder) / "samples" / f"step_{step:06d}.json").read_text())


@pytest.mark.medium
def test_pictures_before_and_after_show_the_same_noise_with_other_weights(make_trainer):
    trainer = make_trainer(num_log_images=5, max_steps=2, learning_rate=1e-2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    before, after = record(folder, 0), record(folder, 2)
    assert (folder / "samples/step_000001.json").exists()  # a quarter of the run, at least one update, lies between two sets
    assert before["prompts"] == after["prompts"] == [digits.PROMPT] * 5
    assert before["step"] == 0
    assert 0 <= before["seconds"] < after["seconds"]
    for entry in (before, after):
        assert len(entry["rewards"]) == len(entry["files"]) == 5
        for file in entry["files"]:
            assert pixels(folder / "samples" / file).shape == (32, 32, 3)
        assert entry["diversity"] > 0
    assert before["rewards"] != after["rewards"]
    assert pixels(folder / "samples/step_000002.png").shape[1] > 3 * 128  # three columns, enlarged
    # the last set is what the trained weights make of that noise now: (prompt 0, repeat 0) is picture 0 of generate
    written = torch.tensor(pixels(folder / "samples" / after["files"][0])).permute(2, 0, 1) / 255
    torch.testing.assert_close(written, trainer.generate([digits.PROMPT], seed=trainer.args.seed)[0], rtol=0, atol=0.01)


def weights_after(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}


@pytest.mark.parametrize("check_reward", [True, False])
@pytest.mark.medium
def test_pictures_and_evaluations_change_nothing_in_the_training(make_trainer, pipeline, seven, check_reward):
    """Not even with prompts and rewards that draw from the global generators."""

    def prompt():
        return digits.class_prompt(int(torch.randint(10, ()))), {}

    def noisy(images, prompts, metadata):
        return seven(images, prompts, metadata) + 0.1 * torch.rand(len(prompts))

    def run(**options):
        torch.default_generator.manual_seed(5)
        trainer = make_trainer(
            sd_pipeline=copy.deepcopy(pipeline), prompt_function=prompt, reward_function=noisy, check_reward=check_reward, **options
        )
        torch.default_generator.manual_seed(6)
        return trainer, weights_after(trainer)

    quiet, expected = run(output_dir="quiet")
    shown, found = run(
        output_dir="shown", num_log_images=3, log_images_steps=1, eval_strategy="steps", eval_steps=1, eval_on_start=True,
        eval_dataset=[{"prompt": digits.class_prompt(d)} for d in range(3)],
    )  # fmt: skip
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    own, more = run(
        output_dir="own", num_log_images=6
    )  # the pictures' prompts are the run's own: drawn ahead, and used all the same
    assert all(torch.equal(expected[name], more[name]) for name in expected)
    assert quiet.rewards.queries == shown.rewards.queries == own.rewards.queries
    assert (quiet.parts.evaluator.queries, shown.parts.evaluator.queries, own.parts.evaluator.queries) == (0, 3 * 3 + 3 * 3, 3 * 6)
    assert len(set(record("own", 0)["prompts"])) > 1


@pytest.mark.medium
def test_a_resumed_run_shows_the_pictures_of_its_beginning(make_trainer, pipeline):
    names = iter(digits.DIGIT_NAMES * 10)
    options = {"save_strategy": "steps", "save_steps": 1, "num_log_images": 3, "check_reward": False, "num_images_per_prompt": 2}

    def prompt():
        return f"{digits.PROMPT} {next(names)}", {"any": 1}

    first = make_trainer(sd_pipeline=copy.deepcopy(pipeline), prompt_function=prompt, max_steps=1, **options)
    first.train()
    folder = first.args.output_dir
    assert record(folder, 0)["prompts"] == [f"{digits.PROMPT} {name}" for name in ("zero", "zero", "one")]  # two prompts a rollout
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), prompt_function=prompt, max_steps=2, **options).train(
        resume_from_checkpoint=True
    )
    assert record(folder, 2)["prompts"] == record(folder, 0)["prompts"]


@pytest.mark.medium
def test_overwriting_removes_the_pictures_of_the_other_run(make_trainer, pipeline):
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), num_log_images=1, max_steps=3).train()
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), num_log_images=1, max_steps=1, overwrite=True)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert sorted(path.stem for path in folder.glob("samples/step_*.json")) == ["step_000000", "step_000001"]


@pytest.mark.medium
def test_a_run_that_is_stopped_from_outside_takes_no_pictures_at_its_end(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.parts.termination.stopped = control.should_training_stop = True
            return control

    trainer = make_trainer(num_log_images=1, log_images_steps=3, max_steps=3)
    trainer.add_callback(Stop())
    with pytest.raises(SystemExit):
        trainer.train()
    assert [path.stem for path in Path(trainer.args.output_dir).glob("samples/step_*.json")] == ["step_000000"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_log_images": -1}, "num_log_images=-1: must be a whole number"),
        ({"log_images_steps": 0}, "log_images_steps=0"),
        ({"eval_images_per_prompt": 0}, "eval_images_per_prompt=0"),
        ({"log_step_norms": True, "log_estimator_norms": False}, "set the latter to True"),
    ],
)
def test_options_of_the_log_are_checked(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_diversity_is_the_mean_distance_of_pictures_of_one_prompt():
    images = torch.zeros(5, 3, 8, 8)
    images[1] += 0.5
    images[2, 0] += 1.0  # one of three channels: distance sqrt(1/3) to black
    images[4] += 0.2
    first = (0.5 + (1 / 3) ** 0.5 + ((0.25 + 0.25 + 0.25) / 3) ** 0.5) / 3
    assert diversity(images, ["a", "a", "a", "b", "b"]) == pytest.approx((first + 0.2) / 2, abs=1e-6)
    assert math.isnan(diversity(images, list("abcde")))
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert diversity(noise, ["a"] * 64) == pytest.approx((1 / 6) ** 0.5, abs=0.01)


def test_large_pictures_are_compared_as_thumbnails_and_videos_too():
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert thumbnails(images).shape == (2, 3 * 32 * 32)
    mean = images.reshape(2, 3, 32, 2, 32, 3).mean((3, 5)).flatten(1)
    torch.testing.assert_close(thumbnails(images), mean)
    video = torch.rand(2, 4, 3, 16, 16)
    assert thumbnails(video).shape == (2, 4 * 3 * 16 * 16)
    assert picture_grid(video, ["one", "two"]).size[0] > 2 * 128


@pytest.mark.medium
def test_diversity_of_a_rollout_is_logged_where_prompts_repeat(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["diversity"] > 0
    rows = [{"prompt": digits.class_prompt(d)} for d in range(4)]
    trainer = make_trainer(max_steps=1, train_dataset=rows, output_dir="other")
    trainer.train()
    assert "diversity" not in trainer.state.log_history[0]
