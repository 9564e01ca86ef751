"""What every neural reward must do: a gradient, each picture against its own prompt, micro-batches that change nothing."""

import copy
import logging
import math

import pytest
import tiny_rewards
import torch

from rlr_trainer.rewards import AestheticScore, ClassifierScore, CLIPScore, HPSv2, ImageReward, PickScore
from rlr_trainer.rewards.neural.base import NeuralReward, PromptCache
from rlr_trainer.rewards.neural.preprocessing import ImageRangeError

METADATA = ({}, {}, {})
LOADERS = {
    "aesthetic": lambda folder, **options: AestheticScore.from_pretrained(tiny_rewards.aesthetic_folder(folder), **options),
    "classifier": lambda folder, **options: ClassifierScore.from_pretrained(
        tiny_rewards.classifier_folder(folder), "owl", output="log_probability", **options
    ),
    "clip_score": lambda folder, **options: CLIPScore.from_pretrained(tiny_rewards.clip_folder(folder), **options),
    "hpsv2.1": lambda folder, **options: HPSv2.from_pretrained(tiny_rewards.hpsv2_folder(folder), **options),
    "image_reward": lambda folder, **options: ImageReward.from_pretrained(tiny_rewards.image_reward_folder(folder), **options),
    "pickscore": lambda folder, **options: PickScore.from_pretrained(tiny_rewards.clip_folder(folder), **options),
}
READ_PROMPTS = ("clip_score", "hpsv2.1", "image_reward", "pickscore")


@pytest.fixture(scope="module", params=LOADERS)
def loaded(request, tmp_path_factory):
    """(name, folder, reward); the reward must not be changed."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    return request.param, folder, LOADERS[request.param](folder)


@pytest.fixture
def reward(loaded):
    return copy.deepcopy(loaded[2])


@pytest.fixture
def pictures():
    return tiny_rewards.squares()


def test_the_gradient_is_the_functions(reward, pictures):
    """In float64, along random directions in the pictures, against central differences."""
    reward(pictures, tiny_rewards.PROMPTS, METADATA)  # keeps the prompts' features: transformers 4 cannot read them in float64
    reward.model.double()
    pictures = pictures.double().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
    assert not any(module.training for module in reward.model.modules())  # dropout would be noise
    (gradient,) = torch.autograd.grad((reward(pictures, tiny_rewards.PROMPTS, METADATA) * weight).sum(), pictures)
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()
    for _ in range(3):
        direction = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (
                (reward(pictures + sign * 1e-5 * direction, tiny_rewards.PROMPTS, METADATA) * weight).sum() for sign in (1, -1)
            )
        assert (gradient * direction).sum().item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-5, abs=1e-9)


def test_micro_batches_change_nothing(reward, pictures):
    """Each pass has at most `batch_size` pictures, and is done again in the backward pass on demand."""
    seen = []
    score = reward.score
    reward.score = lambda pixels, conditions: seen.append(len(pixels)) or score(pixels, conditions)
    pictures.requires_grad_()
    whole = reward(pictures, tiny_rewards.PROMPTS, METADATA)
    (expected,) = torch.autograd.grad(whole.square().sum(), pictures)
    for recompute, passes in ((False, [1, 2]), (True, [1, 1, 2, 2])):
        seen.clear()
        reward.batch_size, reward.recompute = 2, recompute
        parts = reward(pictures, tiny_rewards.PROMPTS, METADATA)
        (gradient,) = torch.autograd.grad(parts.square().sum(), pictures)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        assert sorted(seen) == passes


def test_each_picture_is_scored_against_its_own_prompt(loaded, pictures):
    """Alone, in another order, and with other prompts beside it, a pair has the same score."""
    name, _, reward = loaded
    scores = reward(pictures, tiny_rewards.PROMPTS, METADATA)
    alone = torch.cat([reward(pictures[i : i + 1], tiny_rewards.PROMPTS[i : i + 1], ({},)) for i in range(3)])
    torch.testing.assert_close(alone, scores, rtol=1e-5, atol=1e-6)
    order = [2, 0, 1]
    other = reward(pictures[order], tuple(tiny_rewards.PROMPTS[i] for i in order), METADATA)
    torch.testing.assert_close(other, scores[order], rtol=1e-5, atol=1e-6)
    moved = reward(pictures, tuple(tiny_rewards.PROMPTS[i] for i in order), METADATA)
    assert ((moved - scores).abs() > 1e-3 * scores.abs()).all() == (name in READ_PROMPTS)


def test_half_precision_weights_score_alike(loaded, pictures):
    """bfloat16 has 3 digits: scores to 5 % of their size, and no picture out of order by more."""
    name, folder, reward = loaded
    half = LOADERS[name](folder, dtype=torch.bfloat16)
    assert half.parameter.dtype == torch.bfloat16
    scores = half(pictures, tiny_rewards.PROMPTS, METADATA)
    expected = reward(pictures, tiny_rewards.PROMPTS, METADATA)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["aesthetic", "image_reward"])
def test_half_precision_does_not_round_the_scores_of_a_head(name, tmp_path):
    """In bfloat16 scores around 5 would be multiples of 1/32, far apart for an advantage."""
    reward = LOADERS[name](tmp_path / "model", dtype=torch.bfloat16)
    reward.model.head.layers[-1].bias.fill_(5.0)
    pictures = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = reward(pictures, ("seven",) * 16, ({},) * 16)
    assert len(scores.unique()) == 16
    assert reward.parameter.dtype == torch.bfloat16


def test_half_precision_leaves_pickscores_scale(tmp_path):
    folder = tiny_rewards.clip_folder(tmp_path)
    exact, half = (PickScore.from_pretrained(folder, dtype=dtype) for dtype in (None, torch.bfloat16))
    cosine = torch.tensor([0.2])
    assert half.from_cosine(cosine).item() == exact.from_cosine(cosine).item()
    assert exact.from_cosine(cosine).item() == pytest.approx(0.2 * math.exp(2.6592), rel=1e-4)  # transformers' initial scale


def test_wrong_batches_are_refused(loaded, pictures):
    name, _, reward = loaded
    with pytest.raises(ImageRangeError, match=f"reward '{name}': images is torch.float32 .* from 0.4 to 1.6"):
        reward(2 * pictures, tiny_rewards.PROMPTS, METADATA)
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        reward(pictures, ("a", "b"), METADATA)
    if name in READ_PROMPTS:
        with pytest.raises(ValueError, match="0 prompts for 3 images"):
            reward(pictures, None, None)
    else:
        assert reward(pictures, None, None).shape == (3,)


def test_impossible_options_are_refused():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="batch_size=0"):
        NeuralReward(model, torch.nn.Identity(), name="mine", batch_size=0)
    with pytest.raises(ValueError, match="no parameters"):
        NeuralReward(torch.nn.Identity(), torch.nn.Identity(), name="mine")
    with pytest.raises(ValueError, match=r"version='v3': must be v2\.0 or v2\.1"):
        HPSv2.from_pretrained(version="v3")
    with pytest.raises(TypeError, match="batchsize"):
        NeuralReward(model, torch.nn.Identity(), name="mine", batchsize=1)
    with pytest.raises(TypeError, match=r"eight_bit=True: needs preprocess to be an ImagePreprocessor, not Identity"):
        NeuralReward(model, torch.nn.Identity(), name="mine", eight_bit=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_it_follows_the_pictures_to_their_device(tmp_path, pictures):
    reward = CLIPScore.from_pretrained(tiny_rewards.clip_folder(tmp_path))
    expected = reward(pictures, tiny_rewards.PROMPTS, METADATA)
    scores = reward(pictures.cuda(), tiny_rewards.PROMPTS, METADATA)
    assert scores.is_cuda and reward.parameter.is_cuda
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-3, atol=1e-4)


# ---- prompts ----


def test_a_prompt_is_read_once(tmp_path, pictures):
    reward = CLIPScore.from_pretrained(tiny_rewards.clip_folder(tmp_path))
    passes = []
    reward.model.text_model.register_forward_hook(lambda module, arguments, output: passes.append(torch.is_grad_enabled()))
    first = reward(pictures.requires_grad_(), ("seven", "a nine", "seven"), METADATA)
    second = reward(pictures, ("a nine", "a nine", "seven"), METADATA)
    assert passes == [False]  # one pass, of both prompts, without a graph
    assert second[2].item() == first[2].item()


def test_features_from_inference_mode_can_enter_a_graph(tmp_path, pictures):
    reward = CLIPScore.from_pretrained(tiny_rewards.clip_folder(tmp_path))
    with torch.inference_mode():
        before = reward(pictures, tiny_rewards.PROMPTS, METADATA).clone()
    scores = reward(pictures.requires_grad_(), tiny_rewards.PROMPTS, METADATA)
    scores.sum().backward()
    assert pictures.grad.abs().max() > 0
    torch.testing.assert_close(scores.detach(), before)


def test_the_cache_keeps_the_last_used():
    read = []

    def encode(prompts):
        read.extend(prompts)
        return torch.tensor([[float(len(prompt))] for prompt in prompts])

    cache = PromptCache(encode, size=2)
    assert cache(["a", "bb", "a"], "cpu").tolist() == [[1], [2], [1]]
    assert cache(["a", "ccc"], "cpu").tolist() == [[1], [3]]  # "bb" is the least recently used
    assert cache(["a"], "cpu").tolist() == [[1]]
    assert read == ["a", "bb", "ccc"]
    assert cache(["bb", "ccc", "dddd"], "cpu").tolist() == [[2], [3], [4]]  # a batch larger than the cache
    assert read == ["a", "bb", "ccc", "bb", "dddd"]


def test_the_cache_keeps_the_memory_of_its_rows_alone():
    cache = PromptCache(lambda prompts: torch.ones(len(prompts), 8), size=10)
    for first in range(0, 1000, 40):  # "0" is used again and again, the others once
        cache(["0", *map(str, range(first + 1, first + 41))], "cpu")
    storages = {row.untyped_storage().data_ptr(): row.untyped_storage().nbytes() for row in cache._kept.values()}
    assert sum(storages.values()) == 10 * 8 * 4


def test_the_cache_follows_a_model_that_others_move():
    """The network of two rewards, say: the other one has brought it to the new device."""
    device = "cpu"
    cache = PromptCache(lambda prompts: torch.ones(len(prompts), 1, device=device))
    cache(["a"], device)
    device = "meta"
    assert cache(["a", "b"], device).device.type == "meta"


@pytest.mark.parametrize("name", ["clip_score", "image_reward"])
def test_a_prompt_that_is_cut_is_named(name, tmp_path, pictures, caplog):
    reward = LOADERS[name](tmp_path / "model")
    long = "a handwritten digit, " * 40
    with caplog.at_level(logging.WARNING, "rlr_trainer"):
        scores = reward(pictures, (long, long + "seven", "seven"), METADATA)
        reward(pictures, (long, "seven", "seven"), METADATA)
    assert scores.isfinite().all()
    warnings = [record.message[:28] for record in caplog.records if record.name.startswith("rlr_trainer")]
    assert warnings == ["prompt 'a handwritten digit,"] * 2  # once a prompt, and none for the short one
