"""From a pipeline, or a folder of one, to its adapter; what all adapters share."""

import pytest
import torch

from rlr_trainer.pipelines import adapt, load_pipeline


def test_a_wrapped_pipeline_is_unwrapped(pipeline):
    class Wrapper:  # as TRL's DefaultDDPOStableDiffusionPipeline
        sd_pipeline = pipeline

    assert adapt(Wrapper()).pipeline is pipeline


def test_a_pipeline_without_an_adapter():
    class OtherPipeline:
        config = {}

    with pytest.raises(TypeError, match=r"OtherPipeline, which has no adapter; supported are .*StableDiffusionPipeline"):
        adapt(OtherPipeline())


def test_a_folder_that_is_missing_or_damaged(pipeline, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model_index.json"):
        load_pipeline(tmp_path / "empty")
    pipeline.save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pipeline(str(tmp_path / "broken"))
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pipeline(tmp_path / "broken")


def test_pictures_are_decoded_in_the_decoders_precision_within_autocast_too(pipeline):
    """A diagnosis decodes there. In float16 a VAE overflows, which is why the trainer keeps it in float32."""
    adapter = adapt(pipeline)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = adapter.decode(latents, adapter.layout(None, None))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(adapter.decode(latents, adapter.layout(None, None)), expected)
