"""The Stable Diffusion adapter against the pipeline's own sampler."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler

from rlr_trainer import digits
from rlr_trainer.estimators.chain import sample_chain
from rlr_trainer.pipelines import Layout, PipelineChain, Policy, PromptCache, adapt, load_pipeline
from rlr_trainer.schedules import SamplerOptions

PROMPTS = [digits.class_prompt(3), digits.class_prompt(8)]


def make_chain(pipeline, prompts=PROMPTS, negatives=("", ""), guidance=1.0, steps=5, eta=1.0):
    adapter = adapt(pipeline)
    policy = Policy(adapter.denoiser)
    layout = adapter.layout(None, None)
    conditioning = adapter.encode(prompts, list(negatives), guidance, layout, PromptCache())
    schedule, live = adapter.schedule(layout, SamplerOptions(steps, eta)), policy.trainable_parameters()
    return adapter, PipelineChain(adapter, policy, policy, schedule, conditioning, layout, torch.device("cpu"), live)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_equals_the_pipelines_own(pipeline, monkeypatch, guidance, prediction):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction)
    negatives = [digits.class_prompt(1)] * 2
    adapter, chain = make_chain(pipeline, negatives=negatives, guidance=guidance)
    rollout = sample_chain(chain, 2, torch.Generator().manual_seed(0))
    noises = iter(rollout.noises)
    step = pipeline.scheduler.step

    def with_our_noise(output, timestep, sample, eta=0.0, generator=None, return_dict=True, **kwargs):
        return step(output, timestep, sample, eta=eta, variance_noise=next(noises), return_dict=return_dict)

    monkeypatch.setattr(pipeline.scheduler, "step", with_our_noise)
    images = pipeline(
        PROMPTS, negative_prompt=negatives, num_inference_steps=5, guidance_scale=guidance, eta=1.0, latents=rollout.latents[0],
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(adapter.decode(rollout.sample, chain.layout).detach(), images, rtol=0, atol=2e-4)


def test_pictures_are_decoded_in_the_decoders_precision_within_autocast_too(pipeline):
    """A diagnosis decodes there. In float16 a VAE overflows, which is why the trainer keeps it in float32."""
    adapter = adapt(pipeline)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = adapter.decode(latents, adapter.layout(None, None))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(adapter.decode(latents, adapter.layout(None, None)), expected)


def test_any_height_and_width(pipeline):
    adapter = adapt(pipeline)
    assert adapter.layout(None, None) == Layout((4, 8, 8), 32, 32)
    assert adapter.layout(48, 64) == Layout((4, 12, 16), 48, 64)
    with pytest.raises(ValueError, match="height=33: must be a positive multiple of 4"):
        adapter.layout(33, None)


def test_frames_are_refused(pipeline):
    rule = "num_frames=8: StableDiffusionPipeline makes pictures, not videos; leave it unset"
    with pytest.raises(ValueError, match=rule):
        adapt(pipeline).layout(None, None, num_frames=8)


def test_no_guidance_means_no_negative_branch(pipeline):
    adapter = adapt(pipeline)
    for scale, guided in ((1.0, False), (0.0, False), (1.5, True)):
        conditioning = adapter.encode(["a"], [""], scale, adapter.layout(None, None), PromptCache())
        assert (conditioning.negative is not None) == guided


def test_other_parameters_run_the_same_network(pipeline):
    """The functional path (perturbed or frozen parameters) and the live one agree, and the first leaves the live weights alone."""
    pipeline.unet.requires_grad_(False)
    pipeline.unet.conv_out.requires_grad_(True)
    _, chain = make_chain(pipeline)
    x = chain.initial(2, torch.Generator().manual_seed(0))
    live, _ = chain.transition(1, x, chain.parameters())
    same, _ = chain.transition(1, x, {name: p.detach().clone() for name, p in chain.parameters().items()})
    torch.testing.assert_close(live, same, rtol=0, atol=0)
    moved, _ = chain.transition(1, x, {name: p.detach() + 0.1 for name, p in chain.parameters().items()})
    assert not torch.allclose(live, moved, atol=1e-3)
    torch.testing.assert_close(chain.transition(1, x, chain.parameters())[0], live, rtol=0, atol=0)


def test_selected_rows_keep_their_prompts(pipeline):
    _, chain = make_chain(pipeline, guidance=3.0)
    x = chain.initial(2, torch.Generator().manual_seed(0))
    both, _ = chain.transition(2, x, chain.parameters())
    second, _ = chain.select(torch.tensor([1])).transition(2, x[1:], chain.parameters())
    torch.testing.assert_close(second, both[1:], rtol=0, atol=1e-5)


def test_one_step_prediction_at_the_last_step_is_the_schedulers(pipeline):
    _, chain = make_chain(pipeline)
    x = chain.initial(2, torch.Generator().manual_seed(0))
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(5)
    timestep = scheduler.timesteps[3]
    embeds = chain.conditioning.positive["encoder_hidden_states"]
    output = pipeline.unet(x, timestep, embeds).sample
    expected = scheduler.step(output, timestep, x, eta=1.0, variance_noise=torch.zeros_like(x)).pred_original_sample
    torch.testing.assert_close(chain.predict_clean(3, x, chain.parameters()), expected, rtol=0, atol=1e-5)


def test_models_that_the_adapter_cannot_feed(pipeline):
    other = copy.deepcopy(pipeline)
    other.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="time_cond_proj_dim=8"):
        adapt(other)
    other = copy.deepcopy(pipeline)
    other.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels"):
        adapt(other)


def test_a_wrapped_pipeline_is_unwrapped(pipeline):
    class Wrapper:  # as TRL's DefaultDDPOStableDiffusionPipeline
        sd_pipeline = pipeline

    assert adapt(Wrapper()).pipeline is pipeline


def test_a_pipeline_without_an_adapter():
    class OtherPipeline:
        config = {}

    with pytest.raises(TypeError, match="OtherPipeline, which has no adapter; supported are StableDiffusionPipeline"):
        adapt(OtherPipeline())


def test_a_part_that_the_pipeline_was_saved_without_is_not_missed():
    loaded = load_pipeline(digits.MODELS["digits-flow"] / "pipeline")
    assert loaded.text_encoder_3 is None
    assert loaded.transformer is not None


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
