"""From prompts to latents."""

import pytest
import torch
from tiny_adapter import tiny_run

from rlr_trainer.estimators.chain import seeded_generator
from rlr_trainer.pipelines import ScaledConditioning
from rlr_trainer.rollouts.prompts import PromptRow


def generators(count):
    return [seeded_generator(1, i) for i in range(count)]


def test_rows_bring_their_own_negative_prompts():
    """DDPOTrainer has one for all (T16)."""
    sampler = tiny_run(guidance=2.0).sampler
    sampler.negative_prompt = "of the run"
    rows = [PromptRow("abc", {}, text) for text in ("o", "tw", None, "o")]
    conditioning = sampler.condition(rows)
    assert [round(10 * float(value)) for value in conditioning.negative["prompt"]] == [1, 2, 10, 1]
    assert sorted(sampler.adapter.asked) == sorted({"abc", "o", "tw", "of the run"})  # each once


def test_a_sample_depends_on_its_noise_and_prompt_alone():
    run = tiny_run(guidance=2.0)
    rows = [PromptRow(text, {}) for text in ("a", "aa", "aaaa")]
    together = run.sampler.sample(run.policy, rows, generators(3)).sample
    alone = torch.cat([run.sampler.sample(run.policy, [rows[i]], [generators(3)[i]]).sample for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert len({round(float(row.sum()), 4) for row in together}) == 3


def test_prompts_of_several_scales_change_at_their_steps():
    run = tiny_run(first_steps=(1, 3))
    conditioning = run.sampler.condition([PromptRow("aaa", {}, None, ("a", "aa", "aaa")), PromptRow("aaaaa", {})])
    assert isinstance(conditioning, ScaledConditioning)
    values = [[round(10 * float(v)) for v in conditioning.at(step).positive["prompt"]] for step in range(4)]
    assert values == [[1, 5], [2, 5], [2, 5], [3, 5]]
    with pytest.raises(ValueError, match=r"brings 2 prompts, one per scale, but prompt_scales=\[1, 3\] makes 3 scales"):
        run.sampler.condition([PromptRow("ab", {}, None, ("a", "ab"))])


def test_a_sampler_apart_leaves_no_trace():
    sampler = tiny_run().sampler
    other = sampler.apart()
    other.condition([PromptRow("abc", {})])
    assert (len(other.cache), len(sampler.cache)) == (1, 0)
