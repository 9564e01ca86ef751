"""Conditioning of a batch, and the cache of encoded prompts."""

import torch

from rlr_trainer.pipelines import Conditioning, PromptCache, ScaledConditioning


def of_length(length, value=1.0, **batch):
    """One row of `length` tokens, each of two numbers, with its mask."""
    rows = {"states": torch.full((1, length, 2), value), "mask": torch.ones(1, length), "pooled": torch.full((1, 3), value)}
    return Conditioning(rows, {"states": torch.zeros(1, 1, 2), "mask": torch.ones(1, 1), "pooled": torch.zeros(1, 3)}, 2.0, batch)


def test_rows_of_other_lengths_are_padded_at_their_end():
    joined = Conditioning.concatenate([of_length(1), of_length(3, 2.0)])
    assert joined.positive["states"].shape == (2, 3, 2)
    assert joined.positive["states"][0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert joined.positive["mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert joined.positive["pooled"].tolist() == [[1] * 3, [2] * 3]
    both = joined.guided()  # one call of the network: negative rows first
    assert both["states"].shape == (4, 3, 2)
    assert both["mask"].tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]


def test_what_belongs_to_the_whole_batch_stays_when_rows_are_chosen():
    joined = Conditioning.concatenate([of_length(2, 1.0, ids=torch.arange(4), size=(8, 8)), of_length(2, 2.0, ids=torch.arange(4))])
    second = joined.select(torch.tensor([1]))
    assert (second.positive["pooled"].tolist(), second.negative["pooled"].shape) == ([[2] * 3], (1, 3))
    assert second.batch["size"] == (8, 8) and torch.equal(second.batch["ids"], torch.arange(4))
    moved = second.to("meta")
    assert {t.device.type for t in (moved.positive["states"], moved.negative["mask"], moved.batch["ids"])} == {"meta"}
    assert (moved.batch["size"], moved.guidance_scale) == ((8, 8), 2.0)


def test_scales_change_at_their_steps():
    scales = tuple(of_length(1, value) for value in (1.0, 2.0, 3.0))
    scaled = ScaledConditioning(scales, (2, 4))
    assert [scaled.at(step) for step in range(6)] == [scales[i] for i in (0, 0, 1, 1, 2, 2)]
    joined = ScaledConditioning.concatenate([scaled, scaled]).select(torch.tensor([1])).to("cpu")
    assert joined.first_steps == (2, 4)
    assert joined.at(5).positive["pooled"].tolist() == [[3] * 3]


def test_each_prompt_is_encoded_once_with_those_asked_for_next():
    calls = []

    def encode(prompts):
        calls.append(list(prompts))
        longest = max(map(len, prompts))
        return {"states": torch.stack([torch.tensor([[float(ord(c))] for c in p.ljust(longest, "\0")]) for p in prompts])}

    cache = PromptCache()
    rows = cache.rows(["a", "bc", "a"], encode, keep=["def"])
    assert rows["states"][..., 0].tolist() == [[97, 0, 0], [98, 99, 0], [97, 0, 0]]
    cache.rows(["def", "bc"], encode)
    assert calls == [["a", "bc", "def"]]
    assert cache.rows(["wxyz", "a"], encode)["states"][..., 0].tolist() == [
        [119, 120, 121, 122],
        [97, 0, 0, 0],
    ]  # longer than before


def test_the_cache_forgets_what_was_longest_unused():
    cache = PromptCache(max_bytes=3 * 4)

    def encode(prompts):
        return {"row": torch.zeros(len(prompts), 1)}  # 4 bytes each

    for text in "abc":
        cache.rows([text], encode)
    cache.rows(["a"], encode)
    cache.rows(["d", "e"], encode)
    assert len(cache) == 5  # until the batch has its rows
    cache.shrink()
    assert len(cache) == 3
    asked = []
    cache.rows(list("ade"), lambda prompts: asked.extend(prompts) or encode(prompts))
    assert not asked
