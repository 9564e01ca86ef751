"""The bundled flow-matching model: its loader, its training program, and on fewer pictures the quality its card claims."""

import importlib
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bundled_files import assert_small_and_anonymous, training_program

from rlr_trainer import digits
from rlr_trainer.pipelines import adapt

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "digits"
WEIGHTS = digits.MODELS["digits-flow"]
WEIGHT_LIMIT = 4_000_000


@pytest.fixture(scope="module")
def pipeline():
    return digits.load_pipeline("digits-flow")


@pytest.fixture(scope="module")
def program():
    yield from training_program("pretrain_flow")


@pytest.fixture(scope="module")
def named():
    """200 class prompts and their classes."""
    labels = torch.arange(200) % 10
    return [digits.class_prompt(int(digit)) for digit in labels], labels


def share_read_as(labels, images):
    return float((digits.load_classifier("judge")(images).argmax(-1) == labels).float().mean())


# ------------------------------------------------------------------------------------------------------------ pipeline


def test_pipeline_parts(pipeline):
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    assert pipeline.text_encoder_3 is None
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not part.training
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert not pipeline.scheduler.config.stochastic_sampling
    assert pipeline.transformer.config.sample_size == 8
    # the encoders differ, or one of them would do
    first, second = (next(encoder.parameters()) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2))
    assert not torch.equal(first, second)


def test_pipeline_loads_without_warnings(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        digits.load_pipeline("digits-flow")
    assert not caplog.records


def test_every_word_of_the_prompts_is_one_token(pipeline):
    for tokenizer, encoder in ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)):
        assert {len(tokenizer(digits.class_prompt(digit)).input_ids) for digit in range(10)} == {6}
        assert encoder.config.max_position_embeddings == tokenizer.model_max_length
        assert encoder.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.medium
def test_vae_latents_are_standardized(pipeline, program):
    pytest.importorskip("sklearn")
    data, config = importlib.import_module("pretrain").load_data(), pipeline.vae.config
    with torch.no_grad():
        latents = pipeline.vae.encode(2 * data.test_images - 1).latent_dist.mean
        decoded = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    latents = (latents - config.shift_factor) * config.scaling_factor
    assert latents.mean().abs() < 0.1
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
    assert (decoded - data.test_images).square().mean().sqrt() < 0.06


def test_training_does_not_add_256_zero_rows_to_the_prompt(pipeline):
    count, length = (
        adapt(pipeline).encode_prompts([digits.PROMPT])["encoder_hidden_states"].shape[1],
        pipeline.tokenizer.model_max_length,
    )
    assert count in (length, 2 * length)  # none; diffusers 0.35 knows no other number than the tokenizer's


@pytest.mark.parametrize("model", ["digits-flaw", "no/such/folder"])
def test_unknown_model_is_an_error(model):
    with pytest.raises(ValueError, match="must be one of digits, digits-flow, moving-digits, or a folder of weights"):
        digits.load_pipeline(model)


def test_a_folder_loads_like_the_name(tmp_path, pipeline):
    shutil.copytree(WEIGHTS, tmp_path / "copy")
    for folder in (tmp_path / "copy", str(tmp_path / "copy")):
        loaded = digits.load_pipeline(folder)
        assert torch.equal(loaded.transformer.proj_out.weight, pipeline.transformer.proj_out.weight)


def test_damaged_weights_name_the_program_that_makes_them(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS, tmp_path / "copy")
    (tmp_path / "copy" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setitem(digits.MODELS, "digits-flow", tmp_path / "copy")
    with pytest.raises(RuntimeError, match=r"are missing or damaged[\s\S]*examples/digits/pretrain_flow.py --output_dir"):
        digits.load_pipeline("digits-flow")


# ------------------------------------------------------------------------------------------------------------- program


@pytest.mark.parametrize("rows", [0, 1, 7, 256])
def test_one_weighted_row_equals_many_zero_rows(pipeline, program, rows):
    generator = torch.Generator().manual_seed(0)
    transformer = digits.load_pipeline("digits-flow").transformer.double()
    noisy = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=generator)
    text = torch.randn(2, 5, 64, dtype=torch.float64, generator=generator)
    pooled = torch.randn(2, 64, dtype=torch.float64, generator=generator)
    sigmas = torch.tensor([0.3, 0.9], dtype=torch.float64)
    with torch.no_grad():
        expected = transformer(noisy, F.pad(text, (0, 0, 0, rows)), pooled, 1000 * sigmas).sample
        transformer.set_attn_processor(program.MaskedJointAttention())
        counts = torch.full((2,), float(rows), dtype=torch.float64)
        computed = program.predict_velocity(transformer, noisy, sigmas, text, pooled, counts)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-8)


def test_training_encodes_prompts_as_the_pipeline_does(pipeline, program):
    tokens = pipeline.tokenizer([digits.PROMPT], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text, pooled = program.encode_table([pipeline.text_encoder, pipeline.text_encoder_2], tokens)
        of_pipeline, _, pooled_of_pipeline, _ = pipeline.encode_prompt(
            digits.PROMPT, None, None, do_classifier_free_guidance=False, max_sequence_length=3
        )
    zero_rows = of_pipeline.shape[1] - text.shape[1]
    assert zero_rows > 0
    torch.testing.assert_close(F.pad(text, (0, 0, 0, zero_rows)), of_pipeline)
    torch.testing.assert_close(pooled, pooled_of_pipeline)


def test_numbers_of_zero_rows(program):
    counts = program.choose_rows(10_000, torch.Generator().manual_seed(0))
    assert torch.equal(counts, counts.round())
    assert counts.min() == 0
    assert counts.max() == 256
    assert abs(float((counts == 256).float().mean()) - 0.5) < 0.03
    assert abs(float((counts == 0).float().mean()) - 0.25) < 0.03
    assert len(counts.unique()) > 100


@pytest.mark.parametrize(("noise", "stochastic"), [(0.0, False), (1.0, True)])
def test_noise_of_zero_and_one_are_the_schedulers_own_samplers(pipeline, program, noise, stochastic):
    own = type(pipeline.scheduler).from_config(pipeline.scheduler.config, stochastic_sampling=stochastic)
    ours = program.noisy_scheduler(pipeline.scheduler, noise)
    x, output = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # diffusers 0.35 draws from the global generator alone
    ours.generator.manual_seed(2)
    for scheduler in (own, ours):
        scheduler.set_timesteps(4)
    for t in own.timesteps:
        expected = own.step(output, t, x, return_dict=False)[0]
        torch.testing.assert_close(ours.step(output, t, x, return_dict=False)[0], expected)


def test_noise_between_keeps_the_level_of_noise(pipeline, program):
    scheduler = program.noisy_scheduler(pipeline.scheduler, 0.8)
    scheduler.set_timesteps(4)
    clean, noise = torch.full((200_000,), 3.0), torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    sigma, following = scheduler.sigmas[:2]
    stepped = scheduler.step(noise - clean, scheduler.timesteps[0], clean.lerp(noise, sigma), return_dict=False)[0]
    assert float(stepped.mean()) == pytest.approx(float(3 * (1 - following)), abs=5 * float(following) / 200_000**0.5)
    assert float(stepped.std()) == pytest.approx(float(following), rel=5 / (2 * 200_000) ** 0.5)


# ------------------------------------------------------------------------------------------------------------- quality


@pytest.mark.parametrize(("noise", "guidance"), [(0.0, 1.0), (0.8, 1.0), (0.0, 3.0)])
@pytest.mark.medium
def test_class_prompts_are_drawn_as_asked(pipeline, program, named, noise, guidance):
    prompts, labels = named
    images = program.sample(pipeline, prompts, program.Mode(rows=0, noise=noise, guidance=guidance), seed=12345)
    assert images.shape == (200, 3, 32, 32)
    assert share_read_as(labels, images) >= 0.93


@pytest.mark.medium
def test_class_prompts_are_drawn_as_asked_with_the_rows_that_the_pipeline_adds(pipeline, named):
    prompts, labels = named
    generator = torch.Generator().manual_seed(3)
    images = pipeline(prompts[:40], num_inference_steps=10, guidance_scale=1.0, generator=generator, output_type="pt").images
    assert share_read_as(labels[:40], images) >= 0.9


@pytest.mark.medium
def test_plain_prompt_draws_every_digit(pipeline, program):
    images = program.sample(pipeline, [digits.PROMPT] * 200, program.Mode(rows=0), seed=54321)
    probabilities = digits.load_classifier("judge")(images).softmax(-1)
    shares = probabilities.argmax(-1).bincount(minlength=10) / len(images)
    assert shares.min() >= 0.02
    assert shares.max() <= 0.25
    assert 0.03 <= probabilities[:, 7].mean() <= 0.2


def test_model_card_and_figures_agree():
    quality = json.loads((WEIGHTS / "quality.json").read_text())
    card = (WEIGHTS / "README.md").read_text()
    assert "CC BY 4.0" in card
    assert quality["command"] in card
    ten_steps = [mode for mode in quality["class_prompts"] if mode["steps"] == 10]
    for mode in quality["class_prompts"]:
        assert mode["samples"] >= 1000
        assert f"{100 * mode['judge']:.1f} %" in card
    assert {mode["guidance"] for mode in ten_steps} >= {1.0, 3.0}
    assert min(mode["judge"] for mode in ten_steps if mode["noise"] == 0) >= 0.95


def test_weights_are_small_and_name_no_machine():
    assert_small_and_anonymous(WEIGHTS, WEIGHT_LIMIT)


@pytest.mark.slow
def test_program_runs_and_its_result_loads(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, str(FOLDER / "pretrain_flow.py"), "--output_dir", str(tmp_path / "made"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    digits.load_pipeline(tmp_path / "made")([digits.PROMPT], num_inference_steps=2)
    quality = json.loads((tmp_path / "made" / "quality.json").read_text())
    assert quality["settings"]["flow_steps"] == 2
    assert "--quick" in (tmp_path / "made" / "README.md").read_text()
