"""The conformance kit passes the family that the repository trusts, and rejects each known mistake by the check that is for it."""

import re

import pytest
import torch
from families.conformance import CONFORMANCE
from families.tiny.stable_diffusion import make_pipeline

from rlr_trainer.pipelines import StableDiffusionAdapter
from rlr_trainer.testing import ConformanceError, check_adapter


def failed(make_adapter, checks, make=make_pipeline):
    """Names of the checks that fail, and the message."""
    with pytest.raises(ConformanceError) as caught:
        check_adapter(make, make_adapter=make_adapter, checks=checks)
    message = str(caught.value)
    return set(re.findall(r"^- (\w+):", message, re.MULTILINE)), message


@pytest.mark.parametrize("check", CONFORMANCE)
def test_stable_diffusion_conforms(check):
    (line,) = check_adapter(make_pipeline, checks=[check])
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


class AddsShiftFactor(StableDiffusionAdapter):
    def unpack(self, latents, layout):
        return super().unpack(latents, layout) + 0.1


class RowsOfTheBatch(StableDiffusionAdapter):
    def encode_prompts(self, prompts):
        states = super().encode_prompts(prompts)["encoder_hidden_states"]
        return {"encoder_hidden_states": states - states.mean(0)}


MUTANTS = [
    (WrongTimeScale, "generation"),
    (SwappedBranches, "generation"),
    (GuidesTwice, "generation"),
    (ForgetsScalingFactor, "generation"),
    (AddsShiftFactor, "generation"),
    (RowsOfTheBatch, "generation"),
]


@pytest.mark.parametrize(("adapter", "check"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_mistake_is_rejected(adapter, check):
    names, _ = failed(adapter, [check])
    assert names == {check}


def test_the_message_gives_figure_rule_and_cause():
    _, message = failed(SwappedBranches, ["generation"])
    assert "1 of 1 checks failed" in message
    expected = r"pictures with guidance 4 and a negative prompt per row differ from the pipeline's own by up to 0\.\d+ \(rule: at most 0.0001\)"
    assert re.search(expected + r"\. Usual cause: .*guide", message)


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
