"""Flux.1 Kontext on a tiny pipeline of the real classes: pictures conditioned on a reference picture."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from families.conformance import CONFORMANCE
from families.short_prompts import SHORT, adapt_short
from families.tiny.flux_kontext import make_pipeline, make_sized_pipeline, pictures
from PIL import Image

from rlr_trainer import RLRConfig, RLRTrainer
from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter

REFERENCES = [{"image": picture} for picture in pictures()]


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    check_adapter(make_sized_pipeline, metadata=REFERENCES, height=16, width=16, checks=[check], **SHORT)


def latents(*images, size=(16, 16)):
    adapter = adapt(make_pipeline())
    with torch.no_grad():
        return adapter.encode_metadata([{"image": image} for image in images], adapter.layout(*size))["image_latents"]


def test_references_of_any_size_and_mode_become_as_many_tokens():
    grey, clear = Image.new("L", (40, 9), 100), Image.new("RGBA", (5, 5), (100, 100, 100, 0))
    found = latents(grey, clear, torch.full((3, 7, 7), 100 / 255), size=(24, 16))
    assert found.shape == (3, 6 * 4, 16)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), TypeError, "is torch.uint8, but must be a PIL picture or"),
        ({"bytes": b"", "path": "a.png"}, TypeError, "is dict, but must be a PIL picture or"),
        (torch.zeros(1, 3, 8, 8), ValueError, r"has the shape \(1, 3, 8, 8\)"),
        (torch.full((3, 8, 8), 2.0), ValueError, "values from 2 to 2, but must be"),
        (torch.full((3, 8, 8), torch.nan), ValueError, "values from nan to nan, but must be"),
    ],
)
def test_what_is_no_picture_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        latents(image)


def test_the_usual_size_is_the_one_that_the_pipeline_makes_of_it():
    pipeline = make_pipeline()
    pipeline.default_sample_size = 512  # times the factor 2 of the tiny VAE: 1024 pixels, as 128 times 8
    layout = adapt(pipeline).layout(None, None)
    assert (layout.height, layout.width) == (1024, 1024)


def test_positions_of_the_reference_are_told_apart():
    adapter = adapt(make_pipeline())
    ids = adapter.batch_inputs(adapter.layout(8, 16), 2.5)["img_ids"]
    picture, reference = ids[:8], ids[8:]
    assert picture[:, 0].tolist() == [0.0] * 8 and reference[:, 0].tolist() == [1.0] * 8
    assert torch.equal(picture[:, 1:], reference[:, 1:])
    assert picture[-1].tolist() == [0, 1, 3]


# ---- training on a dataset of pictures ----


def darkness_of_reference(images, prompts, metadata):
    """How near each picture's brightness is to that of its own reference."""
    wanted = torch.tensor([float(np.asarray(row["image"].convert("L")).mean()) / 255 for row in metadata])
    return -(images.mean((1, 2, 3)) - wanted).square()


def dataset():
    rows = [{"prompt": f"a picture of {name}", "image": picture} for name in ("a cat", "two dogs") for picture in pictures()]
    return Dataset.from_list(rows)


def make_trainer(folder, **options):
    adapter = adapt_short(make_pipeline())
    data = {name: options.pop(name) for name in ("prompt_function", "eval_dataset", "image_samples_hook") if name in options}
    if "prompt_function" not in data:
        data["train_dataset"] = options.pop("train_dataset", None) or dataset()
    config = RLRConfig(
        **{
            "output_dir": str(folder), "sample_num_steps": 3, "sample_guidance_scale": 2.5, "per_device_train_batch_size": 4,
            "max_steps": 2, "lora_r": 2, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True, "num_log_images": 0,
            "height": 16, "width": 16, "save_strategy": "no",
        } | options
    )  # fmt: skip
    return RLRTrainer(config, darkness_of_reference, sd_pipeline=adapter, **data)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}


@pytest.mark.medium
def test_a_run_on_pictures_is_logged_evaluated_and_resumes_bit_for_bit(tmp_path):
    assert isinstance(dataset().features["image"], ImageColumn)
    seen = []
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "num_log_images": 2}
    hook = {"image_samples_hook": lambda batches, step, tracker: seen.extend(row for batch in batches for row in batch[2])}
    trainer = make_trainer(tmp_path / "run", eval_dataset=dataset(), **options, **hook)
    start = weights(trainer)
    trainer.train()
    ended = weights(trainer)
    assert any(not torch.equal(start[name], ended[name]) for name in start)
    assert {type(row["image"]).__module__.split(".")[0] for row in seen} == {"PIL"}
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "run/samples").glob("step_*.json"))]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all(json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert trainer.evaluate()["eval_reward"] < 0

    resumed = make_trainer(tmp_path / "run", eval_dataset=dataset(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    for name, value in weights(resumed).items():
        assert torch.equal(value, ended[name]), name


@pytest.mark.medium
def test_a_prompt_function_may_bring_pictures_and_resume(tmp_path):
    def prompt():
        return "a cat", {"image": random.choice(pictures())}

    options = {"save_strategy": "steps", "save_steps": 1, "prompt_function": prompt}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(trainer)[name]), name


def test_generate_takes_references(tmp_path):
    trainer = make_trainer(tmp_path)
    dark, orange = (trainer.generate(["a cat"], metadata=[row])[0] for row in REFERENCES)
    assert float((dark - orange).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="'a cat' comes without image"):
        trainer.generate(["a cat"])


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_dataset_without_pictures_is_refused_at_once(tmp_path, name):
    with pytest.raises(ValueError, match="'a cat' comes without image, which this pipeline is conditioned on"):
        make_trainer(tmp_path, **{name: Dataset.from_list([{"prompt": "a cat"}])})
