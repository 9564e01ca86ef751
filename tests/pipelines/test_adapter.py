"""What the base of adapters does for every family: guidance, encoding, sizes, and LoRA targets."""

import pytest
import torch
from tiny_adapter import SHAPE, TinyAdapter
from torch import nn

from rlr_trainer.digits.rewards import ink
from rlr_trainer.pipelines import Conditioning, PromptCache, adapt
from rlr_trainer.pipelines.lora import attach_lora
from rlr_trainer.rollouts.prompts import PromptRow
from rlr_trainer.rollouts.sampler import Sampler


def rows(*values):
    return {"prompt": torch.tensor([[value] for value in values])}


def predict(adapter, scale, rescale=0.0):
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    conditioning = Conditioning(rows(0.3, 0.9), rows(-1.0, 2.0), scale, guidance_rescale=rescale)
    conditional, unconditional = (adapter.network(x, torch.tensor(7), **r)[0] for r in (rows(0.3, 0.9), rows(-1.0, 2.0)))
    found = adapter.predict(lambda *args, **kwargs: adapter.network(*args, **kwargs)[0], x, 7, conditioning)
    return found, conditional, unconditional


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_extrapolates_from_the_negative_branch(batched):
    adapter = TinyAdapter()
    adapter.batched_guidance = batched
    found, conditional, unconditional = predict(adapter, 3.0)
    torch.testing.assert_close(found, unconditional + 3 * (conditional - unconditional))


def test_rescaled_guidance_is_that_of_diffusers():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    found, conditional, unconditional = predict(TinyAdapter(), 3.0, rescale=0.7)
    plain = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(found, rescale_noise_cfg(plain, conditional, 0.7))
    assert (found - plain).abs().max() > 0.01


class Apart(TinyAdapter):
    """Encodes negative prompts in another way; records where its encoder was."""

    negatives_apart = True
    text_encoders = ("encoder",)

    def __init__(self):
        super().__init__()
        self.moves = []
        self.pipeline.encoder = nn.Identity()
        self.pipeline.encoder.to = self.moves.append

    frozen_modules = property(lambda self: [self.pipeline.encoder])

    def encode_prompts(self, prompts):
        self.moves.append("encode")
        return super().encode_prompts(prompts)

    def encode_negative_prompts(self, prompts):
        self.moves.append("encode negative")
        return {"prompt": torch.full((len(prompts), 1), -5.0)}


def test_negative_prompts_may_be_encoded_apart():
    adapter, cache = Apart(), PromptCache()
    for _ in range(2):
        conditioning = adapter.encode(["same"], ["same"], 2.0, adapter.layout(None, None), cache)
        assert (float(conditioning.positive["prompt"]), float(conditioning.negative["prompt"])) == (pytest.approx(0.4), -5.0)
    assert adapter.moves == ["encode", "encode negative"]  # each once
    assert adapter.encode(["same"], ["same"], 1.0, adapter.layout(None, None), cache).negative is None


def test_text_encoders_that_wait_on_the_cpu_come_to_encode_alone():
    adapter, cache = Apart(), PromptCache()
    adapter.encoder_device = torch.device("meta")
    for _ in range(2):  # what is in the cache moves nothing
        adapter.encode(["a"], [""], 1.0, adapter.layout(None, None), cache)
    assert adapter.moves == [torch.device("meta"), "encode", "cpu"]


@pytest.mark.medium
def test_text_encoders_are_offloaded_on_request(make_trainer, tmp_path):
    trainer = make_trainer(reward_function=ink, offload_text_encoders=True, max_steps=1)
    trainer.train()
    assert trainer.adapter.encoder_device == trainer.accelerator.device
    plain = make_trainer(reward_function=ink, max_steps=1, output_dir=str(tmp_path / "plain"))
    plain.train()
    left, right = (t.policy.trainable_parameters() for t in (trainer, plain))
    assert all(torch.equal(left[name], right[name]) for name in left)


class Conditioned(TinyAdapter):
    """Needs a picture with every prompt."""

    conditions = ("image",)

    def encode_metadata(self, metadata, layout):
        return {"picture": torch.stack([row["image"] for row in metadata])}


def test_what_a_pipeline_is_conditioned_on_comes_from_the_metadata():
    adapter = Conditioned()
    sampler = Sampler(adapter, None, None, adapter.layout(None, None), 2.0, torch.device("cpu"))
    pictures = [torch.full((3,), value) for value in (1.0, 2.0)]
    found = sampler.condition([PromptRow("p", {"image": picture, "other": 1}) for picture in pictures])
    for branch in (found.positive, found.negative):
        assert torch.equal(branch["picture"], torch.stack(pictures))
    for metadata in ({}, {"image": None}, "text"):
        with pytest.raises(ValueError, match=r"prompt 'p' comes without image, .*column of the dataset"):
            sampler.condition([PromptRow("p", metadata)])


def test_guidance_cannot_be_rescaled_where_the_pipeline_does_not(make_trainer, pipeline):
    adapter = adapt(pipeline)
    adapter.rescales_guidance = False
    with pytest.raises(ValueError, match=r"sample_guidance_rescale=0.5: StableDiffusionPipeline has no such argument"):
        make_trainer(reward_function=ink, sd_pipeline=adapter, sample_guidance_rescale=0.5)


@pytest.mark.parametrize("targets", [["to_q", "to_typo"], ["q"], ["to_out"]])
def test_a_lora_target_that_is_no_layer_is_refused(pipeline, targets):
    from peft import LoraConfig

    dead = next(name for name in targets if name != "to_q")
    message = rf"lora_target_modules: {dead} of .* is no module of UNet2DConditionModel.*linear layers end in .*to_q"
    if dead == "to_out":  # a list of layers, which peft refuses by itself
        message = "not supported"
    with pytest.raises(ValueError, match=message):
        attach_lora(pipeline.unet, LoraConfig(target_modules=targets), 0)
