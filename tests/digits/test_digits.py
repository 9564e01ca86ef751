"""The bundled digits model: its loaders, and on a smaller sample the quality that its model card claims."""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bundled_files import assert_small_and_anonymous

from rlr_trainer import digits
from rlr_trainer.digits import gaussian_frechet_distance

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "digits" / "pretrain.py"
WEIGHT_LIMIT = 5_000_000


@pytest.fixture(scope="module")
def pipeline():
    return digits.load_pipeline()


@pytest.fixture(scope="module")
def pretrain():
    """The training program as a module: its data and its measurements are the ones behind the model card."""
    spec = importlib.util.spec_from_file_location("digits_pretrain", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_pretrain"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(pretrain):
    pytest.importorskip("sklearn")
    return pretrain.load_data()


@pytest.fixture(scope="module")
def named_samples(pipeline, pretrain):
    """200 pictures from class prompts at the settings of the demo: (images [200, 3, 32, 32], classes [200])."""
    labels = torch.arange(200) % 10
    prompts = [digits.class_prompt(int(digit)) for digit in labels]
    return pretrain.sample(pipeline, prompts, steps=10, guidance=1.0, seed=12345), labels


@pytest.fixture(scope="module")
def plain_samples(pipeline, pretrain):
    return pretrain.sample(pipeline, [digits.PROMPT] * 200, steps=10, guidance=1.0, seed=54321)


def copied_weights(tmp_path):
    shutil.copytree(digits.WEIGHTS, tmp_path / "weights")
    return tmp_path / "weights"


# ------------------------------------------------------------------------------------------------------------- prompts


def test_prompts():
    assert digits.PROMPT == "a handwritten digit"
    assert digits.class_prompt(7) == "a handwritten digit seven"
    assert [digits.class_prompt(d).split()[-1] for d in range(10)] == list(digits.DIGIT_NAMES)


@pytest.mark.parametrize("digit", [-1, 10, 7.0, "7", True, None])
def test_digit_out_of_range_is_an_error(digit):
    with pytest.raises(ValueError, match="digit=.* must be an integer from 0 to 9"):
        digits.class_prompt(digit)
    with pytest.raises(ValueError, match="digit=.* must be an integer from 0 to 9"):
        digits.frechet_distance(torch.zeros(20, 3, 32, 32), digit)


# ------------------------------------------------------------------------------------------------------------ pipeline


@pytest.mark.medium
def test_import_is_light():
    code = (
        "import sys, rlr_trainer.digits\n"
        "heavy = {'diffusers', 'transformers', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.medium
def test_runtime_needs_no_sklearn_and_prints_nothing():
    """In a fresh process: no network, no scikit-learn, nothing on either output stream."""
    code = (
        "import socket, sys, torch, warnings\n"
        "sys.modules['sklearn'] = None\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from rlr_trainer import digits\n"
        "pipeline = digits.load_pipeline()\n"
        "warnings.simplefilter('error')\n"
        "images = pipeline([digits.PROMPT] * 20, num_inference_steps=2, output_type='pt').images\n"
        "digits.load_classifier('reward')(images)\n"
        "digits.frechet_distance(images, 7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_pipeline_parts(pipeline):
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.safety_checker is None
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not part.training
    config = pipeline.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.num_train_timesteps, config.steps_offset, config.prediction_type) == (1000, 1, "epsilon")
    assert not config.clip_sample
    assert not config.set_alpha_to_one
    assert pipeline.unet.config.sample_size == 8


def test_pipeline_loads_without_warnings_and_keeps_global_settings(caplog):
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        digits.load_pipeline()
    assert not caplog.records
    assert (diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()) == before


def test_pipeline_gives_pictures_and_follows_the_seed(pipeline, pretrain):
    images = pretrain.sample(pipeline, [digits.class_prompt(3)] * 2, steps=3, guidance=1.0, seed=1)
    again = pretrain.sample(pipeline, [digits.class_prompt(3)] * 2, steps=3, guidance=1.0, seed=1)
    other = pretrain.sample(pipeline, [digits.class_prompt(3)] * 2, steps=3, guidance=1.0, seed=2)
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(images, again)
    assert (images - other).abs().max() > 0.1


def test_tokenizer_takes_any_text(pipeline):
    tokenizer = pipeline.tokenizer
    for digit in range(10):
        # start, four words, end: every word of the prompts is one token
        assert len(tokenizer(digits.class_prompt(digit)).input_ids) == 6
    assert len({tuple(tokenizer(digits.class_prompt(d)).input_ids) for d in range(10)}) == 10
    for text in ["", "A Handwritten  DIGIT", "crème brûlée, 漢字 №42 :-)", "\U0001f600 emoji", "x" * 500]:
        ids = tokenizer(text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
        assert len(ids) == tokenizer.model_max_length
        assert max(ids) < pipeline.text_encoder.config.vocab_size
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id in ids
    assert tokenizer("xyz").input_ids != tokenizer("zyx").input_ids  # spelt out, not "unknown"
    assert pipeline.text_encoder.config.eos_token_id == tokenizer.eos_token_id
    assert pipeline.text_encoder.config.max_position_embeddings == tokenizer.model_max_length


@pytest.mark.medium
def test_vae_latents_are_standardized(pipeline, pretrain, data):
    with torch.no_grad():
        latents = pipeline.vae.encode(2 * data.test_images - 1).latent_dist.mean
        decoded = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    latents = latents * pipeline.vae.config.scaling_factor
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
    assert (decoded - data.test_images).square().mean().sqrt() < 0.06


# --------------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("name", ["reward", "judge"])
class TestClassifier:
    def test_shapes_and_state(self, name):
        model = digits.load_classifier(name)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert sum(p.numel() for p in model.parameters()) < 150_000
        for height, width in [(32, 32), (64, 64), (8, 8), (40, 24)]:
            images = torch.rand(3, 3, height, width)
            assert model(images).shape == (3, 10)
            assert model.features(images).shape[0] == 3
            assert model.features(images).ndim == 2

    @pytest.mark.parametrize("size", [32, 48])
    def test_gradient_in_the_images_matches_differences(self, name, size):
        model = digits.load_classifier(name).double()
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, size, size, dtype=torch.float64, generator=generator, requires_grad=True)
        direction = torch.randn(images.shape, dtype=torch.float64, generator=generator)

        def value(x):
            return model(x).log_softmax(-1)[:, 7].sum()

        (gradient,) = torch.autograd.grad(value(images), images)
        h = 1e-6
        with torch.no_grad():
            difference = (value(images + h * direction) - value(images - h * direction)) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)
        assert (gradient != 0).float().mean() > 0.99  # no pixel is ignored

    def test_held_out_accuracy(self, name, pretrain, data):
        model = digits.load_classifier(name)
        accuracy = (model(data.test_images).argmax(-1) == data.test_labels).float().mean()
        assert accuracy >= 0.95
        larger = F.interpolate(data.test_images, scale_factor=2, mode="bilinear")
        assert (model(larger).argmax(-1) == data.test_labels).float().mean() >= 0.95

    def test_wrong_images_are_an_error(self, name):
        model = digits.load_classifier(name)
        for images in (torch.rand(2, 1, 32, 32), torch.rand(3, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)):
            with pytest.raises(ValueError, match=r"images has shape .* \[B, 3, H, W\]"):
                model(images)


@pytest.mark.medium
def test_judge_withstands_what_fools_the_reward(pretrain, data):
    accuracy = {}
    for name in ("reward", "judge"):
        model = digits.load_classifier(name)
        attacked = pretrain.attack(model, data.test_images, data.test_labels, radius=2.0, steps=10)
        accuracy[name] = float((model(attacked).argmax(-1) == data.test_labels).float().mean())
    assert accuracy["judge"] > accuracy["reward"] + 0.2


def test_judge_is_undecided_on_nonsense(pretrain, data):
    junk = pretrain.nonsense(data.test_images, torch.Generator().manual_seed(99))
    probabilities = digits.load_classifier("judge")(junk).softmax(-1)
    assert probabilities.amax(-1).mean() < 0.25


# ---------------------------------------------------------------------------------------------------- Frechet distance


def test_gaussian_frechet_distance_against_closed_forms():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 5, dtype=torch.float64, generator=generator)
    shift = torch.randn(5, dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator))
    # covariances that commute: sum of squared differences of the standard deviations
    distance = gaussian_frechet_distance(shift, basis * p @ basis.T, torch.zeros_like(shift), basis * q @ basis.T)
    expected = shift.square().sum() + (p.sqrt() - q.sqrt()).square().sum()
    assert distance == pytest.approx(float(expected), abs=1e-10)
    # covariances that do not: the trace of the root from the eigenvalues of the (unsymmetric) product
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    first, second = root @ root.T, basis * q @ basis.T
    cross = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    expected = first.trace() + second.trace() - 2 * cross
    assert gaussian_frechet_distance(shift, first, shift, second) == pytest.approx(float(expected), abs=1e-7)


def test_shipped_statistics_are_those_of_the_real_digits(pretrain, data):
    images = torch.cat([data.train_images, data.test_images])
    labels = torch.cat([data.train_labels, data.test_labels])
    statistics = pretrain.fit_statistics(digits.load_classifier("judge").features(images), labels)
    assert int(statistics["class_counts"].sum()) == 1797
    for digit in range(10):
        assert digits.frechet_distance(images[labels == digit], digit) < 1e-3


def test_frechet_distance_orders_classes_and_damage(pretrain, data):
    sevens = data.test_images[data.test_labels == 7]
    real = digits.frechet_distance(sevens, 7)
    for digit in range(10):
        if digit != 7:
            assert digits.frechet_distance(data.test_images[data.test_labels == digit], 7) > 5 * real
    junk = pretrain.nonsense(sevens, torch.Generator().manual_seed(0))
    assert digits.frechet_distance(junk, 7) > 5 * real
    assert digits.frechet_distance(1 - sevens, 7) > 5 * real
    assert digits.frechet_distance(sevens[:1].expand(36, -1, -1, -1), 7) > 2 * real  # one picture only: collapsed


def test_frechet_distance_needs_enough_pictures():
    with pytest.raises(ValueError, match="images holds 16 pictures: must be at least 17"):
        digits.frechet_distance(torch.rand(16, 3, 32, 32), 7)


# ------------------------------------------------------------------------------------------------------------- quality


@pytest.mark.medium
def test_class_prompts_are_drawn_as_asked(named_samples):
    images, labels = named_samples
    for name in ("reward", "judge"):
        accuracy = (digits.load_classifier(name)(images).argmax(-1) == labels).float().mean()
        assert accuracy >= 0.94, name


@pytest.mark.medium
def test_class_prompts_are_nearer_to_their_class_than_the_plain_prompt(named_samples, plain_samples):
    images, labels = named_samples
    assert digits.frechet_distance(images[labels == 7], 7) < 0.25 * digits.frechet_distance(plain_samples, 7)


def test_plain_prompt_draws_every_digit(plain_samples):
    for name in ("reward", "judge"):
        probabilities = digits.load_classifier(name)(plain_samples).softmax(-1)
        shares = probabilities.argmax(-1).bincount(minlength=10) / len(plain_samples)
        assert shares.min() >= 0.02, name
        assert shares.max() <= 0.25, name
        assert 0.03 <= probabilities[:, 7].mean() <= 0.2, name


@pytest.mark.medium
def test_samples_differ_from_each_other(named_samples):
    images, labels = named_samples
    for digit in range(10):
        distances = torch.pdist(images[labels == digit, 0].flatten(1))
        assert distances.min() > 0.5


def test_model_card_and_figures_agree():
    quality = json.loads((digits.WEIGHTS / "quality.json").read_text())
    card = (digits.WEIGHTS / "README.md").read_text()
    assert "CC BY 4.0" in card
    assert quality["command"] in card
    for classifier in ("reward", "judge"):
        assert quality["classifiers"][classifier]["held_out"] >= 0.95
        for mode in quality["class_prompts"]:
            assert mode["samples"] >= 1000
            assert f"{100 * mode[classifier]:.1f} %" in card
    ten_steps = [mode for mode in quality["class_prompts"] if mode["steps"] == 10]
    assert max(mode["judge"] for mode in ten_steps) >= 0.97


def test_weights_are_small_and_name_no_machine():
    assert_small_and_anonymous(digits.WEIGHTS, WEIGHT_LIMIT)


# -------------------------------------------------------------------------------------------------------------- errors


def test_unknown_classifier_is_an_error():
    with pytest.raises(ValueError, match="name='referee': must be one of reward, judge"):
        digits.load_classifier("referee")


UNET = "pipeline/unet/diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("part", "fault"),
    [(UNET, "missing"), (UNET, "cut"), ("judge", "cut"), ("judge", "of the other classifier"), ("statistics", "missing")],
)
def test_missing_and_damaged_weights_are_an_error(tmp_path, part, fault):
    weights = copied_weights(tmp_path)
    path = weights / f"{part}.safetensors"
    if fault == "missing":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        shutil.copy(weights / "reward.safetensors", path)
    message = r"are missing or damaged[\s\S]*: `python examples/digits/pretrain.py --output_dir"
    with pytest.raises(RuntimeError, match=message):
        digits.load_pipeline(weights) if part == UNET else digits.frechet_distance(torch.rand(20, 3, 8, 8), 7, weights)


# ------------------------------------------------------------------------------------------------------------- program


@pytest.mark.slow
def test_pretrain_runs_and_its_result_loads(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, str(PROGRAM), "--output_dir", str(tmp_path / "made"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    digits.load_pipeline(tmp_path / "made")([digits.PROMPT], num_inference_steps=2)
    for name in ("reward", "judge"):
        digits.load_classifier(name, tmp_path / "made")
    quality = json.loads((tmp_path / "made" / "quality.json").read_text())
    assert quality["settings"]["unet_steps"] == 2
    assert "--quick" in (tmp_path / "made" / "README.md").read_text()


@pytest.mark.medium
def test_pretrain_refuses_wrong_options(tmp_path):
    command = [sys.executable, str(PROGRAM), "--output_dir", str(tmp_path), "--unet_steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "--unet_steps is 0, but it must be positive" in done.stderr
