"""What a run's record says of its rewards and prompts."""

import functools

from datasets import Dataset

from rlr_trainer.digits.rewards import digit_reward
from rlr_trainer.persistence.descriptions import in_words
from rlr_trainer.persistence.provenance import describe_function, describe_prompts
from rlr_trainer.rewards import FrameReward, RemoteReward, jpeg_compressibility
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts


class Smile:
    def __init__(self, scale, token):
        self.scale, self.token, self._calls, self.net = scale, token, 0, object()

    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)) * self.scale


def scaled(images, prompts, metadata, scale=1.0):
    return images.mean(dim=(1, 2, 3)) * scale


def test_options_of_a_reward_are_recorded_and_secrets_are_not():
    assert describe_function(digit_reward(7))["options"]["target"] == 7
    described = describe_function(Smile(2.0, "hush"))
    assert described["options"] == {"scale": 2.0}
    assert described["function"].endswith("test_provenance:Smile") and len(described["code"]) == 16
    partial = describe_function(functools.partial(scaled, scale=3.0))
    assert partial["options"] == {"scale": 3.0} and partial["function"].endswith(":scaled")
    frames = in_words(describe_function(FrameReward(digit_reward(3), 4)))
    assert "num_frames=4" in frames and "target=3" in frames
    remote = in_words(describe_function(RemoteReward("http://localhost:8000", token="a" * 20)))
    assert "http://localhost:8000" in remote and "a" * 20 not in remote
    assert in_words(describe_function(jpeg_compressibility)) == "rlr_trainer.rewards.compressibility:jpeg_compressibility"
    assert in_words(describe_function(len)) == "builtins:len"


def test_an_edited_reward_has_another_digest():
    first = describe_function(scaled)["code"]
    assert first == describe_function(scaled)["code"] != describe_function(lambda images, prompts, metadata: images)["code"]


def test_prompts_are_recorded_by_number_digest_and_the_first_ones():
    def digest(dataset):
        return describe_prompts(DatasetPrompts(dataset, 0))["sha256"]

    texts = [f"a cat {number}" for number in range(7)]
    described = describe_prompts(DatasetPrompts(texts, 0))
    assert described["rows"] == 7 and described["first"] == texts[:5]
    assert in_words(described) == f"7 prompts ('a cat 0', ...), sha256 {described['sha256']}"
    assert digest(texts) == digest(list(texts)) != digest([*texts[:-1], "a dog"])
    rows = [{"prompt": text, "answer": number} for number, text in enumerate(texts)]
    others = [row | {"answer": 0} for row in rows]
    assert digest(rows) == digest([row | {"picture": object()} for row in rows]) != digest(others)
    assert digest(Dataset.from_list(rows)) == digest(Dataset.from_list(rows)) != digest(Dataset.from_list(others))
    assert len(describe_prompts(DatasetPrompts(Dataset.from_list(rows).with_transform(lambda batch: batch), 0))["sha256"]) == 16
    text = "a dog"
    assert describe_prompts(FunctionPrompts(lambda: (text, {})))["options"] == {"text": "a dog"}
