"""Decoding videos chunk by chunk: the same values and gradients, the graph of one chunk; and tiling and slicing as the pipeline has them."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from diffusers import AutoencoderKLWan
from families.tiny import animatediff, cogvideox, hunyuan_video, ltx, wan

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.diagnosis.memory import measuring_memory
from rlr_trainer.digits.rewards import ink
from rlr_trainer.pipelines import adapt
from rlr_trainer.pipelines.decoding import KEPT, Calls, calls_checkpointed

FAMILIES = {
    "animatediff": (animatediff, 3, 6),
    "wan": (wan, 5, 9),
    "cogvideox": (cogvideox, 9, 17),
    "hunyuan_video": (hunyuan_video, 9, 17),
}  # frames, few and twice as many
ROUNDING = 1e-7  # of videos, which are float32; decoders work in float64


def small_tiles(family, vae):
    """Tiles of half a picture."""
    if family == "animatediff":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 8, 4
    elif family == "wan":
        vae.enable_tiling(8, 8, 6, 6)
    elif family == "hunyuan_video":
        vae.enable_tiling(8, 8, 8, 4, 4, 4)
    else:
        vae.enable_tiling(8, 8, 0.25, 0.25)


def decode(adapter, layout, chunks, seed=0):
    """Videos, and the gradient with respect to latents of a sum of all pixels with random weights. The decoder works in float64."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, *layout.shape, generator=generator, dtype=torch.float64).requires_grad_(True)
    weights = torch.randn(2, layout.num_frames, 3, layout.height, layout.width, generator=generator)
    adapter.decodes_in_chunks = chunks
    videos = adapter.decode(latents, layout)
    (gradient,) = torch.autograd.grad((videos * weights).sum(), latents)
    return videos.detach(), gradient


@pytest.fixture(params=list(FAMILIES))
def family(request):
    module, few, many = FAMILIES[request.param]
    adapter = adapt(module.make_pipeline())
    adapter.decoder.requires_grad_(False).double()
    if request.param == "hunyuan_video":  # its tiles of frames, on by default, are longer than a tiny video
        adapter.decoder.tile_sample_min_num_frames, adapter.decoder.tile_sample_stride_num_frames = 8, 4
    return types.SimpleNamespace(name=request.param, adapter=adapter, few=few, many=many)


def test_values_and_gradients_in_chunks_are_those_of_the_whole(family):
    adapter, layout = family.adapter, family.adapter.layout(16, 16, family.few)
    assert_equal_in_chunks(adapter, layout, decode(adapter, layout, False))
    if family.name != "wan":  # whose class has no checkpoints of its own
        whole = decode(adapter, layout, False)
        adapter.decoder.enable_gradient_checkpointing()
        assert_equal_in_chunks(adapter, layout, whole)


def test_so_are_those_of_the_decoder_of_wan_2_2():
    """Of TI2V 5B: residual blocks that double frames, and patches of pixels."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        is_residual=True, patch_size=2, in_channels=12, out_channels=12, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        scale_factor_spatial=16,
    ).double().eval().requires_grad_(False)  # fmt: skip
    latents, found = torch.randn(1, 4, 7, 2, 2, dtype=torch.float64, requires_grad=True), []
    for context in (contextlib.nullcontext(), calls_checkpointed(vae.decoder)):
        with context:
            videos = vae.decode(latents, return_dict=False)[0]
        found.append((videos, *torch.autograd.grad(videos.pow(2).mean(), latents)))
    assert found[0][0].shape == (1, 3, 25, 32, 32) and found[0][1].abs().amax() > 1e-4
    for whole, chunks in zip(*found, strict=True):
        assert torch.allclose(chunks, whole, rtol=0, atol=1e-12)


@pytest.mark.medium
def test_so_are_those_of_tiles(family):
    """The tiles of `enable_tiling` make other pictures than the whole: the pipeline's own."""
    adapter, layout = family.adapter, family.adapter.layout(16, 16, family.few)
    untiled, _ = decode(adapter, layout, False)
    small_tiles(family.name, adapter.decoder)
    tiled = decode(adapter, layout, False)
    assert not torch.allclose(tiled[0], untiled, rtol=0, atol=1e-3)
    assert_equal_in_chunks(adapter, layout, tiled)


def assert_equal_in_chunks(adapter, layout, expected):
    assert expected[1].abs().amax() > 0.1
    for found, one in zip(decode(adapter, layout, True), expected, strict=True):
        assert torch.allclose(found, one, rtol=0, atol=ROUNDING)


def test_ltx_video_is_checkpointed_by_the_switch_of_its_decoder():
    adapter = adapt(ltx.make_pipeline())
    adapter.decoder.requires_grad_(False).double()
    layout, results, peaks = adapter.layout(**ltx.SIZE), [], []
    for _ in range(2):
        with measuring_memory(torch.device("cpu")) as meter:
            results.append(decode(adapter, layout, False))
        peaks.append(meter.peak())
        adapter.decoder.enable_gradient_checkpointing()
    for found, one in zip(*results, strict=True):
        assert torch.allclose(found, one, rtol=0, atol=ROUNDING)
    assert peaks[1] < 0.8 * peaks[0]


def test_slices_of_the_batch_are_the_same_videos(family):
    layout = family.adapter.layout(16, 16, family.few)
    whole = decode(family.adapter, layout, False)
    family.adapter.decoder.enable_slicing()
    for found in (decode(family.adapter, layout, False), decode(family.adapter, layout, True)):
        for one, other in zip(found, whole, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("family", "frames"), [("animatediff", (4, 8)), ("wan", (25, 41))], indirect=["family"])
@pytest.mark.medium
def test_frames_more_cost_their_pixels_alone_in_chunks(family, frames):
    """Pixels, their gradients and what rounds them to [0, 1]; not the graph, nor what a causal decoder hands on."""

    def growth(chunks):
        peaks = []
        for count in frames:
            layout = family.adapter.layout(16, 16, count)
            with measuring_memory(torch.device("cpu")) as meter:
                decode(family.adapter, layout, chunks)
            peaks.append(meter.peak())
        return peaks[1] - peaks[0]

    pixels = (frames[1] - frames[0]) * 2 * 3 * 16 * 16 * 8  # bytes of the additional frames of two videos, float64
    assert growth(True) < 5 * pixels < 0.1 * growth(False)


class HandsOn(torch.nn.Module):
    """Chunks [..., 3], each of which sees the ones before through a state; `calls` counts."""

    calls = 0

    def forward(self, x, conv_cache=None):
        self.calls += 1
        state = torch.tanh(x + (0.7 * conv_cache["state"] if conv_cache else 0))
        return state * state.sum(-1, keepdim=True), {"state": state, "nothing": None}


def through_calls(chunks, checkpointed):
    """Outputs and their gradient with respect to the chunks [N, 3], and the calls that the backward pass made."""
    module, state, outputs = HandsOn(), None, []
    chunks = chunks.clone().requires_grad_(True)
    with calls_checkpointed(module) if checkpointed else contextlib.nullcontext():
        for chunk in chunks:
            output, state = module(chunk, conv_cache=state)
            outputs.append(output)
    module.calls = 0
    total = torch.stack(outputs).pow(3).sum()
    (gradient,) = torch.autograd.grad(total, chunks, retain_graph=True)
    calls = module.calls
    assert torch.equal(*torch.autograd.grad(total, chunks), gradient)  # as for several rewards, one after the other
    return torch.stack(outputs).detach(), gradient, calls


@pytest.mark.parametrize(("count", "most"), [(1, 1), (5, 1), (6, 2), (21, 2.5), (121, 5)])
def test_few_features_are_kept_and_the_others_made_again(count, most, monkeypatch):
    """The same bits, however long the row of calls is; `most` calls of the backward pass for each."""
    kept, features = [], Calls.features
    monkeypatch.setattr(Calls, "features", lambda self, number: (features(self, number), kept.append(len(self.kept)))[0])
    chunks = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    expected, found = through_calls(chunks, False), through_calls(chunks, True)
    assert all(torch.equal(*pair) for pair in zip(expected[:2], found[:2], strict=True))
    assert expected[1].abs().amax() > 0.01
    assert count <= found[2] <= most * count
    assert max(kept) <= KEPT + 1  # with those before the first call, which are nothing


class Scaled(torch.nn.Linear):
    """x times a layer's output, which is then the gradient, too."""

    def forward(self, x):
        return x * super().forward(x.detach())


def test_a_call_is_made_again_without_autocast():
    """The backward pass may run inside it, where the forward pass did not."""
    module, x = Scaled(3, 3).requires_grad_(False), torch.randn(2, 3, requires_grad=True)
    with calls_checkpointed(module):
        output = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output.sum().backward()
    assert torch.allclose(x.grad, output / x, rtol=1e-5, atol=0)


def test_a_forward_that_was_exchanged_is_put_back():
    """accelerate exchanges a module's forward for its hooks."""
    layer = torch.nn.Linear(2, 2)
    with calls_checkpointed(layer):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
    layer.forward = exchanged = layer.forward
    with calls_checkpointed(layer):
        assert layer.forward is not exchanged
    assert layer.forward is exchanged


def make_trainer(folder, pipeline, **options):
    config = RLRConfig(
        str(folder), estimator="draft", sample_num_steps=2, per_device_train_batch_size=2, max_steps=1, num_log_images=0, use_cpu=True,
        disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    return RLRTrainer(config, ink, lambda: ("a seven", {}), pipeline)


@pytest.mark.medium
def test_the_option_of_a_run(tmp_path):
    weights = []
    for chunks in (False, True):
        trainer = make_trainer(tmp_path / str(chunks), animatediff.make_pipeline(), decode_in_chunks=chunks, **animatediff.SIZE)
        assert trainer.parts.adapter.decodes_in_chunks == chunks
        trainer.train()
        weights.append(trainer.parts.policy.trainable_parameters())
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (digits.load_pipeline, {}, "StableDiffusionPipeline: its adapter knows no chunks of frames.*reward_batch_size=1"),
        (ltx.make_pipeline, ltx.SIZE, r"LTXPipeline: its decoder takes all frames at once.*enable_gradient_checkpointing\(\)"),
    ],
)
def test_decoders_that_are_not_divided_refuse_it(tmp_path, make, size, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make(), decode_in_chunks=True, **size)
