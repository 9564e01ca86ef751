"""Pixels of the reward models against the reference processors, on real pictures."""

import dataclasses
import math

import numpy as np
import pytest
import tiny_rewards
import torch
from PIL import Image

from rlr_trainer.rewards.neural.preprocessing import CLIP_MEAN, CLIP_STD, ImagePreprocessor, ImageRangeError, check_images

PICTURES = tiny_rewards.photographs()
LEVEL = 1 / 255


def pil_float(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """PIL's bicubic resize in float32 (mode F), a channel at a time, to (height, width): the reference kernel without rounding."""
    channels = [
        Image.fromarray(channel.numpy()).resize(size[::-1], Image.BICUBIC) for channel in tiny_rewards.to_tensor(picture)[0]
    ]
    return torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])[None]


def processors():
    from transformers import CLIPImageProcessor, DeiTImageProcessor, ViTImageProcessor

    return {
        "clip": CLIPImageProcessor(),
        "clip, odd sizes": CLIPImageProcessor(size={"shortest_edge": 61}, crop_size={"height": 60, "width": 47}),
        "vit": ViTImageProcessor(),
        "deit": DeiTImageProcessor(),
        "not normalized": ViTImageProcessor(do_normalize=False, size={"height": 30, "width": 70}),
    }


ASPECT_KEPT = ("clip", "clip, odd sizes")


@pytest.mark.parametrize("name", processors())
@pytest.mark.parametrize("picture", PICTURES, ids=["china", "flower", "upright"])
def test_pixels_are_those_of_the_transformers_processor(name, picture, tmp_path):
    """With its rounding: equal to 1e-3, but for ties of the rounding (1 in 1,000 values with bicubic, where PIL's fixed-point kernel
    rounds the other way; more with bilinear, whose kernel has more ties), and there one 8-bit level. Without: a mean of half a level.

    A picture that is squeezed more down than across is resized vertically first by Pillow 13, and rounded in between: here, and in
    older versions, never. So an upright picture that loses its aspect ratio is cut to a square first.
    """
    if name not in ASPECT_KEPT and picture.height > picture.width:
        picture = picture.crop((0, 70, 260, 330))
    processor = processors()[name]
    processor.save_pretrained(tmp_path)
    preprocess = ImagePreprocessor.from_pretrained(str(tmp_path))
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    level = LEVEL / min(preprocess.std)
    pixels = dataclasses.replace(preprocess, eight_bit=True)(tiny_rewards.to_tensor(picture))
    difference = (pixels - expected).abs()
    assert difference.shape == expected.shape
    assert difference.max() < 1.01 * level
    assert (difference > 1e-3).float().mean() < (1e-3 if preprocess.resample == "bicubic" else 2e-2)
    smooth = (preprocess(tiny_rewards.to_tensor(picture)) - expected).abs()
    assert smooth.max() < 1.1 * level  # rounded twice by at most half a level, and a kernel whose weights sum to 1.2 in magnitude
    assert smooth.mean() < 0.5 * level


@pytest.mark.parametrize("picture", PICTURES, ids=["china", "flower", "upright"])
@pytest.mark.parametrize("size", [32, 500])
def test_the_resize_is_pils_without_the_rounding(picture, size):
    """To 1e-4 in the scale of [0, 1]; up and down."""
    preprocess = ImagePreprocessor(size=size, mean=(0.0,), std=(1.0,), clip=False)
    height, width = preprocess(tiny_rewards.to_tensor(picture)).shape[-2:]
    assert min(height, width) == size
    assert (
        abs(max(height, width) / size - max(picture.size) / min(picture.size)) < 1 / size
    )  # transformers and torchvision cut the rest
    expected = pil_float(picture, (height, width))
    torch.testing.assert_close(preprocess(tiny_rewards.to_tensor(picture)), expected, atol=1e-4, rtol=0)


def test_torchvisions_crop_differs_by_a_pixel_where_an_odd_number_is_cut():
    """torchvision rounds the middle (half to even), transformers rounds it down: 335 - 224 = 111 pixels, from 56 or 55."""
    picture = tiny_rewards.to_tensor(PICTURES[0])
    torchvision = ImagePreprocessor.torchvision_clip(224)
    whole = dataclasses.replace(torchvision, crop=None)(picture)
    assert whole.shape == (1, 3, 224, 335)
    assert torch.equal(torchvision(picture), whole[..., 56:280])
    assert torch.equal(dataclasses.replace(torchvision, middle=math.floor)(picture), whole[..., 55:279])


@pytest.mark.parametrize("picture", PICTURES, ids=["china", "flower", "upright"])
def test_hpsv2_pads_the_longer_side_with_black(picture):
    """Against its transform written out: resized as floats, nothing clipped, black before the normalization."""
    width, height = picture.size
    scale = 224 / max(height, width)
    resized = pil_float(picture, (round(height * scale), round(width * scale)))
    assert resized.max() > 1 or resized.min() < 0  # the bicubic kernel overshoots: clipping would show
    top, left = (224 - resized.shape[2]) // 2, (224 - resized.shape[3]) // 2
    expected = torch.zeros(1, 3, 224, 224)
    expected[..., top : top + resized.shape[2], left : left + resized.shape[3]] = resized
    expected = (expected - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    torch.testing.assert_close(ImagePreprocessor.hpsv2(224)(tiny_rewards.to_tensor(picture)), expected, atol=1e-4, rtol=0)


def test_a_picture_of_the_right_size_is_only_normalized():
    """In its own precision, but not below float32: a resize in half loses more than an 8-bit step."""
    picture = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    expected = (picture - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    for preprocess in (ImagePreprocessor.torchvision_clip(224), ImagePreprocessor.hpsv2(224)):
        torch.testing.assert_close(preprocess(picture), expected)
        assert torch.equal(preprocess(picture.bfloat16()), preprocess(picture))
        assert preprocess(picture.double()).dtype == torch.float64


def test_rounding_keeps_the_gradient():
    """Away from the clipped values, the gradient with the rounding is that without."""
    preprocess = ImagePreprocessor.torchvision_clip(28)
    weight = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    gradients = []
    for eight_bit in (False, True):
        pictures = tiny_rewards.squares().requires_grad_()
        pixels = dataclasses.replace(preprocess, eight_bit=eight_bit)(pictures)
        gradients.append(torch.autograd.grad((pixels * weight).sum(), pictures)[0])
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients)


def test_a_crop_larger_than_the_picture_is_refused():
    with pytest.raises(ValueError, match=r"crop=\(300, 300\).*\(224, 335\)"):
        ImagePreprocessor(size=224, crop=(300, 300))(tiny_rewards.to_tensor(PICTURES[0]))


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(2, 4, 3, 8, 8), r"of videos \[B, F, 3, H, W\]"),
        (torch.zeros(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
        (torch.full((1, 3, 8, 8), -1.0), r"from -1 to -1.*\[-1, 1\]"),
        (torch.full((1, 3, 8, 8), 255.0), "from 255"),
        ([1.0], "list"),
    ],
)
def test_other_pictures_are_refused(images, named):
    with pytest.raises(ImageRangeError, match=named) as error:
        check_images("pickscore", images)
    assert "'pickscore'" in str(error.value)
    check_images("pickscore", torch.tensor([-1e-3, 1 + 1e-3, 0.5]).reshape(1, 3, 1, 1))  # rounding errors around the range


def test_steps_without_a_counterpart_are_refused():
    from transformers import CLIPImageProcessor

    for name, value in {
        "resample": 1,
        "do_resize": False,
        "do_rescale": False,
        "rescale_factor": 1 / 127.5,
        "do_flip_channel_order": True,
        "size": {"longest_edge": 224},
    }.items():
        processor = CLIPImageProcessor()
        setattr(processor, name, value)
        with pytest.raises(ValueError, match=f"processor of 'some/model'.*{name}="):
            ImagePreprocessor.from_processor(processor, "some/model")
