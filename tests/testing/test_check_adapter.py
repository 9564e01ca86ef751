"""The conformance kit passes the family that the repository trusts, and rejects each known mistake by the check that is for it."""

import re
from pathlib import Path

import pytest
import torch
from families.conformance import WITH_DDPO
from families.tiny import animatediff, flux, sd3
from families.tiny.stable_diffusion import make_pipeline
from safetensors.torch import load_file, save_file

from rlr_trainer.pipelines import LORA_FILE, StableDiffusionAdapter
from rlr_trainer.pipelines.animatediff import AnimateDiffAdapter
from rlr_trainer.pipelines.flux import FluxAdapter
from rlr_trainer.pipelines.lora import save_lora_weights
from rlr_trainer.pipelines.sd3 import StableDiffusion3Adapter
from rlr_trainer.testing import SLOW_CHECKS, ConformanceError, check_adapter


def failed(make_adapter, checks, make=make_pipeline):
    """Names of the checks that fail, and the message."""
    size = animatediff.SIZE if make is animatediff.make_pipeline else {}
    with pytest.raises(ConformanceError) as caught:
        check_adapter(make, make_adapter=make_adapter, checks=checks, **size)
    message = str(caught.value)
    return set(re.findall(r"^- (\w+):", message, re.MULTILINE)), message


@pytest.mark.parametrize("check", WITH_DDPO)
def test_stable_diffusion_conforms(check):
    # its weights are trained, so they move less than random ones do
    (line,) = check_adapter(make_pipeline, checks=[check], learning_rate=3e-2 if check == "ddpo" else 1e-2)
    assert re.match(rf"{check}: .*\d", line)


# ---- mistakes ----


class WrongTimeScale(StableDiffusionAdapter):
    def call(self, network, x, time, rows, batch):
        return super().call(network, x, time / 1000, rows, batch)


class SwappedBranches(StableDiffusionAdapter):
    def guide(self, unconditional, conditional, conditioning):
        return super().guide(conditional, unconditional, conditioning)


class GuidesTwice(StableDiffusionAdapter):
    def guide(self, unconditional, conditional, conditioning):
        once = super().guide(unconditional, conditional, conditioning)
        return super().guide(unconditional, once, conditioning)


class ForgetsScalingFactor(StableDiffusionAdapter):
    def unpack(self, latents, layout):
        return latents


class ForgetsShiftFactor(StableDiffusion3Adapter):
    def unpack(self, latents, layout):
        return latents / self.decoder.config.scaling_factor


class ForgetsEmbeddedScale(FluxAdapter):
    def batch_inputs(self, layout, guidance_scale):
        return super().batch_inputs(layout, 1.0)


class TransposesPositions(FluxAdapter):
    def _positions(self, layout):
        return super()._positions(layout)[:, [0, 2, 1]]


class RowsOfTheBatch(StableDiffusionAdapter):
    def encode_prompts(self, prompts):
        states = super().encode_prompts(prompts)["encoder_hidden_states"]
        return {"encoder_hidden_states": states - states.mean(0)}


class DefaultOffByOne(StableDiffusionAdapter):
    def layout(self, height, width, num_frames=None):
        layout = super().layout(height, width, num_frames)
        return layout if height else super().layout(layout.height + 4, width)


class TakesAnySize(StableDiffusionAdapter):
    def layout(self, height, width, num_frames=None):
        return super().layout(height and height // 4 * 4, width and width // 4 * 4, num_frames)


class TakesFrames(StableDiffusionAdapter):
    def layout(self, height, width, num_frames=None):
        return super().layout(height, width)


class CountsItsCalls(StableDiffusionAdapter):
    calls = 0

    def call(self, network, x, time, rows, batch):
        self.calls += 1
        return super().call(network, x, time, rows, batch) * (1 + 1e-4 * self.calls)


class CutsTheGraph(StableDiffusionAdapter):
    def decode(self, latents, layout):
        with torch.no_grad():
            return super().decode(latents, layout)


class UnusedModules(StableDiffusionAdapter):
    lora_targets = ("spare",)

    def __init__(self, pipeline):
        super().__init__(pipeline)
        pipeline.unet.spare = torch.nn.Linear(4, 4)


class OneUnusedTarget(UnusedModules):
    lora_targets = ("to_q", "to_k", "to_v", "spare")


class UnknownTarget(StableDiffusionAdapter):
    lora_targets = ("to_q", "to_query")


class TrainsTheTextEncoder(StableDiffusionAdapter):
    lora_targets = ("q_proj",)
    denoiser_folder = "text_encoder"

    def call(self, network, x, time, rows, batch):
        return self.pipeline.unet(x, time, **rows).sample


class OtherPrefix(StableDiffusionAdapter):
    def save_lora(self, directory):
        save_lora_weights(type(self.pipeline), self.denoiser, directory, layers="unet_lora_layers")
        path = Path(directory) / LORA_FILE
        save_file({key.replace("unet.", "transformer."): tensor for key, tensor in load_file(path).items()}, path)


class NeverCheckpoints(StableDiffusionAdapter):
    def __init__(self, pipeline):
        super().__init__(pipeline)
        pipeline.unet.enable_gradient_checkpointing = lambda: None


class CastsTheNetwork(StableDiffusionAdapter):
    def call(self, network, x, time, rows, batch):
        if torch.is_autocast_enabled("cpu"):
            self.denoiser.to(torch.bfloat16)
        return super().call(network, x, time, rows, batch)


class LoadsNothing(StableDiffusionAdapter):
    def load_denoiser(self, directory):
        pass

    def load_lora(self, directory):
        pass


class TurnsTheGradient(StableDiffusionAdapter):
    def decode(self, latents, layout):
        return super().decode(2 * latents.detach() - latents, layout)


class ForgetsFrames(AnimateDiffAdapter):
    def layout(self, height, width, num_frames=None):
        return super().layout(height, width, 3 if num_frames else None)


class ReversesFrames(AnimateDiffAdapter):
    def decode(self, latents, layout):
        return super().decode(latents, layout).flip(1)


class PromptsOfOtherFrames(AnimateDiffAdapter):
    def call(self, network, x, time, rows, batch):
        states = rows["encoder_hidden_states"].repeat(x.shape[2], 1, 1)
        return network(x, time, encoder_hidden_states=states)


MUTANTS = [
    (ForgetsFrames, "layout", animatediff.make_pipeline),
    (ReversesFrames, "generation", animatediff.make_pipeline),
    (PromptsOfOtherFrames, "generation", animatediff.make_pipeline),
    (WrongTimeScale, "generation", make_pipeline),
    (SwappedBranches, "generation", make_pipeline),
    (GuidesTwice, "generation", make_pipeline),
    (ForgetsScalingFactor, "generation", make_pipeline),
    (ForgetsShiftFactor, "generation", sd3.make_pipeline),
    (ForgetsEmbeddedScale, "generation", flux.make_pipeline),
    (TransposesPositions, "generation", flux.make_pipeline),
    (RowsOfTheBatch, "prompts", make_pipeline),
    (DefaultOffByOne, "layout", make_pipeline),
    (TakesAnySize, "layout", make_pipeline),
    (TakesFrames, "layout", make_pipeline),
    (CountsItsCalls, "ratio", make_pipeline),
    (CutsTheGraph, "gradients", make_pipeline),
    (UnusedModules, "lora", make_pipeline),
    (OneUnusedTarget, "lora", make_pipeline),
    (UnknownTarget, "lora", make_pipeline),
    (TrainsTheTextEncoder, "lora", make_pipeline),
    (OtherPrefix, "lora", make_pipeline),
    (NeverCheckpoints, "checkpointing", make_pipeline),
    (CastsTheNetwork, "bf16", make_pipeline),
    (LoadsNothing, "whole_network", make_pipeline),
    (LoadsNothing, "resume", make_pipeline),
    (TurnsTheGradient, "draft", make_pipeline),
]


@pytest.mark.parametrize(
    ("adapter", "check", "make"),
    [
        pytest.param(*mutant, id=f"{mutant[0].__name__}-{mutant[1]}", marks=[pytest.mark.slow] if mutant[1] in SLOW_CHECKS else [])
        for mutant in MUTANTS
    ],
)
@pytest.mark.medium
def test_a_mistake_is_rejected(adapter, check, make):
    names, _ = failed(adapter, [check], make)
    assert names == {check}


@pytest.mark.medium
def test_the_message_gives_figure_rule_and_cause():
    _, message = failed(SwappedBranches, ["generation"])
    assert "1 of 1 checks failed" in message
    expected = r"pictures with guidance 4 and a negative prompt per row differ from the pipeline's own by up to 0\.\d+ \(rule: at most 0.0001\)"
    assert re.search(expected + r"\. Usual cause: .*guide", message)


@pytest.mark.medium
def test_a_degenerate_pipeline_is_reported():
    """A network whose output is zero makes the same picture of every prompt: nothing could fail on it."""

    def silent():
        pipeline = make_pipeline()
        torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
        return pipeline

    names, message = failed(StableDiffusionAdapter, ["generation"], silent)
    assert names == {"generation"}
    assert "the tiny pipeline is degenerate: the prompt changes it by 0 " in message
    assert "the tiny pipeline is degenerate: the time changes it by" in message


@pytest.mark.medium
def test_a_solver_that_looks_back_is_replaced_and_named():
    from diffusers import UniPCMultistepScheduler

    def with_unipc():
        pipeline = make_pipeline()
        pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
        return pipeline

    (line,) = check_adapter(with_unipc, checks=["generation"])
    assert "DDIMScheduler in place of its UniPCMultistepScheduler, which is not comparable" in line


def test_what_cannot_be_checked():
    with pytest.raises(ValueError, match="generating is unknown; must be of generation"):
        check_adapter(make_pipeline, checks=["generating"])
    with pytest.raises(ValueError, match="must be two or more, of different lengths"):
        check_adapter(make_pipeline, prompts=("a", "b"))
    with pytest.raises(ValueError, match="metadata has 1 rows for 2 prompts"):
        check_adapter(make_pipeline, metadata=[{}])
