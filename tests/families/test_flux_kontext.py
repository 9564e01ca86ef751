"""Flux.1 Kontext on a tiny pipeline of the real classes: pictures conditioned on a reference picture."""

from __future__ import annotations

import pytest
import torch
from families.conformance import CONFORMANCE
from families.tiny.flux_kontext import make_pipeline, make_sized_pipeline, pictures
from PIL import Image

from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter

REFERENCES = [{"image": picture} for picture in pictures()]


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    check_adapter(make_sized_pipeline, metadata=REFERENCES, height=16, width=16, checks=[check])


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
