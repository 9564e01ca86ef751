"""PixArt-Sigma on a tiny pipeline of the real classes: T5 states with a mask, and a transformer that predicts variances beside the noise."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from families.chains import assert_on_the_grid_of_its_scheduler, assert_solved_alike
from families.conformance import CONFORMANCE
from families.tiny.pixart_sigma import NOISE, make_pipeline
from peft import LoraConfig, PeftModel

from rlr_trainer.pipelines import adapt, attach_lora, load_pipeline
from rlr_trainer.testing import check_adapter


@pytest.mark.parametrize("check", CONFORMANCE)
def test_it_conforms(check):
    check_adapter(make_pipeline, checks=[check], call_arguments={"use_resolution_binning": False})


def pictures(pipeline):
    generator = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "pt", "use_resolution_binning": False}
    return pipeline(["a red fox"], generator=generator, **call).images


@pytest.fixture
def trained(tmp_path):
    """An adapter with LoRA weights that do something, saved to `tmp_path`."""
    adapter = adapt(make_pipeline())
    attach_lora(adapter.denoiser, LoraConfig(r=2, lora_alpha=6, target_modules=list(adapter.lora_targets)), seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapter.denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    adapter.save_lora(tmp_path)
    return adapter


def test_peft_loads_the_lora_weights(trained, tmp_path):
    expected, pipeline = pictures(trained.pipeline), make_pipeline()
    assert (pictures(pipeline) - expected).abs().max() > 0.1
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, tmp_path)
    assert torch.equal(pictures(pipeline), expected)


def test_the_code_of_the_model_card_loads_them(trained, tmp_path):
    pipeline = make_pipeline()
    exec(trained.lora_snippet(repr(str(tmp_path))), {"pipe": pipeline})
    assert torch.equal(pictures(pipeline), pictures(trained.pipeline))


def test_weights_that_peft_loaded_are_continued(trained, tmp_path):
    pipeline = make_pipeline()
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, tmp_path)
    adapter = adapt(pipeline)
    assert attach_lora(adapter.denoiser, None, seed=0)
    trainable = {name: p for name, p in adapter.denoiser.named_parameters() if p.requires_grad}
    expected = {name: p for name, p in trained.denoiser.named_parameters() if p.requires_grad}
    assert trainable.keys() == expected.keys()
    assert all(torch.equal(trainable[name], expected[name]) for name in expected)


def test_a_pipeline_with_weights_in_its_folder_is_loaded_with_them(trained, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path)
    assert torch.equal(pictures(pipeline), pictures(trained.pipeline))


def test_weights_of_another_rank_are_refused(trained, tmp_path):
    adapter = adapt(make_pipeline())
    attach_lora(adapter.denoiser, LoraConfig(r=3, target_modules=list(adapter.lora_targets)), seed=0)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors does not fit the adapter being trained: 32 of 32 tensors"):
        adapter.load_lora(tmp_path)
    with pytest.raises(ValueError, match="cannot read LoRA weights from .*adapter_model.safetensors"):
        adapter.load_lora(tmp_path / "missing")


def test_pictures_equal_those_of_the_released_solver_at_first_order():
    assert_solved_alike(make_pipeline(DPMSolverMultistepScheduler(solver_order=1, **NOISE)), use_resolution_binning=False)


def test_the_released_multistep_solver_becomes_ddim_on_its_grid(caplog):
    assert_on_the_grid_of_its_scheduler(adapt(make_pipeline()))
    assert "ddim stands in for DPMSolverMultistepScheduler" in caplog.text


def test_a_transformer_without_variances_is_sampled_as_well():
    def plain():
        pipeline, cls = make_pipeline(), type(make_pipeline().transformer)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            pipeline.transformer = cls.from_config(pipeline.transformer.config, out_channels=4)
        return pipeline

    check_adapter(plain, checks=["generation"], call_arguments={"use_resolution_binning": False})


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((12, 16), "height=12: must be a positive multiple of 8"),
        ((16, 20), "width=20: must be a positive multiple of 8"),
        ((16, 16, 4), "num_frames=4: PixArtSigmaPipeline makes pictures"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline()).layout(*size)


def test_a_model_that_takes_the_picture_size_is_refused():
    pipeline = make_pipeline()
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, use_additional_conditions=True)
    with pytest.raises(ValueError, match="use_additional_conditions=True: it takes the picture's size, as PixArt-Alpha does"):
        adapt(pipeline)


def test_a_model_with_other_channels_is_refused():
    pipeline = make_pipeline()
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels but the VAE makes 4: an inpainting"):
        adapt(pipeline)


def test_a_pipeline_without_text_encoder_is_refused():
    pipeline = make_pipeline()
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match="text_encoder=None: prompts cannot be encoded"):
        adapt(pipeline)
