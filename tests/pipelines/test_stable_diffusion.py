"""The Stable Diffusion adapter against the pipeline's own sampler."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler

from rlr_trainer import digits
from rlr_trainer.estimators.chain import sample_chain, seeded_generator
from rlr_trainer.pipelines import Conditioning, PipelineChain, Policy, ScaledConditioning, adapt
from rlr_trainer.pipelines import base as pipelines_base

PROMPTS = [digits.class_prompt(3), digits.class_prompt(8)]


def make_chain(pipeline, prompts=PROMPTS, negatives=("", ""), guidance=1.0, steps=5, eta=1.0):
    adapter = adapt(pipeline)
    policy = Policy(adapter.denoiser)
    conditioning = adapter.condition(prompts, list(negatives), guidance)
    shape = adapter.latent_shape(None, None)
    chain = PipelineChain(adapter, policy, policy, adapter.schedule(steps, eta), conditioning, shape, torch.device("cpu"))
    return adapter, chain


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
    torch.testing.assert_close(adapter.decode(rollout.sample).detach(), images, rtol=0, atol=2e-4)


def test_pictures_are_decoded_in_the_decoders_precision_within_autocast_too(pipeline):
    """A diagnosis decodes there. In float16 a VAE overflows, which is why the trainer keeps it in float32."""
    adapter = adapt(pipeline)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = adapter.decode(latents)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(adapter.decode(latents), expected)


def test_any_height_and_width(pipeline):
    adapter = adapt(pipeline)
    assert adapter.latent_shape(None, None) == (4, 8, 8)
    assert adapter.latent_shape(48, 64) == (4, 12, 16)


def test_each_prompt_is_encoded_once(pipeline, monkeypatch):
    adapter = adapt(pipeline)
    calls = []
    encode = adapter.encode_prompts
    monkeypatch.setattr(adapter, "encode_prompts", lambda prompts: calls.extend(prompts) or encode(prompts))
    first = adapter.condition(["a", "b", "a"], ["", "", ""], 5.0)
    adapter.condition(["b", "a"], ["", ""], 5.0)
    assert sorted(calls) == ["", "a", "b"]
    rows = first.positive["encoder_hidden_states"]
    assert torch.equal(rows[0], rows[2])
    own = pipeline.encode_prompt(["b"], "cpu", 1, False)[0][0]
    torch.testing.assert_close(rows[1], own, rtol=0, atol=1e-6)


def test_the_prompt_cache_is_bounded(pipeline, monkeypatch):
    monkeypatch.setattr(pipelines_base, "PROMPT_CACHE_SIZE", 3)
    adapter = adapt(pipeline)
    for text in "abcdef":
        adapter.condition([text], [""], 1.0)
    assert len(adapter._encoded) == 3


def test_no_guidance_means_no_negative_branch(pipeline):
    adapter = adapt(pipeline)
    assert adapter.condition(["a"], [""], 1.0).negative is None
    assert adapter.condition(["a"], [""], 0.0).negative is None
    assert adapter.condition(["a"], [""], 1.5).negative is not None


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


def test_scaled_conditioning_changes_at_its_steps(pipeline):
    adapter = adapt(pipeline)
    coarse, mid, fine = (adapter.condition([digits.class_prompt(d)], [""], 1.0) for d in (1, 2, 3))
    scaled = ScaledConditioning((coarse, mid, fine), (2, 4))
    assert [scaled.at(step) for step in range(6)] == [coarse, coarse, mid, mid, fine, fine]
    joined = ScaledConditioning.concatenate([scaled, scaled]).select(torch.tensor([1]))
    assert isinstance(joined.at(0), Conditioning)
    assert torch.equal(joined.at(5).positive["encoder_hidden_states"], fine.positive["encoder_hidden_states"])


def test_scale_prompts_reach_their_steps(make_trainer):
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(prompts)
        return images.mean((1, 2, 3))

    texts = (digits.class_prompt(3), digits.class_prompt(8))
    trainer = make_trainer(
        prompt_scales=[1], prompt_function=lambda: (texts, {}), reward_function=reward, sample_guidance_scale=3.0
    )
    trainer.train()
    assert set(seen) == {texts[1]}  # the reward sees the finest
    generated = trainer.generate([texts] * 2, seed=4)
    parts = [adapt(trainer.adapter).condition([text] * 2, [""] * 2, 3.0) for text in texts]
    generators = [seeded_generator(4, 3, i) for i in range(2)]
    rollout = sample_chain(trainer._make_chain(trainer.model, ScaledConditioning(tuple(parts), (1,))), 2, generators)
    torch.testing.assert_close(generated, trainer.adapter.decode(rollout.sample).detach(), rtol=0, atol=1e-5)


def test_wrong_numbers_of_scales(make_trainer):
    with pytest.raises(ValueError, match=r"prompt_scales=\[3, 2\]: must be increasing"):
        make_trainer(prompt_scales=[3, 2])
    with pytest.raises(ValueError, match=r"prompt_scales=\[4\]"):
        make_trainer(prompt_scales=[4])
    trainer = make_trainer(prompt_scales=[2], prompt_function=lambda: (("a", "b", "c"), {}))
    with pytest.raises(ValueError, match="brings 3 prompts, one per scale, but prompt_scales=\\[2\\] makes 2 scales"):
        trainer.train()


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
