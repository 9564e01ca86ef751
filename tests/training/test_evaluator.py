"""Pictures and rewards outside training, without a trainer."""

import contextlib
import math
import random

import numpy as np
import pytest
import torch
from tiny_adapter import brightness, processes, tiny_run

from rlr_trainer import RewardError
from rlr_trainer.observing.pictures import diversity
from rlr_trainer.rewards.calling import groupwise
from rlr_trainer.rewards.interface import Rewards
from rlr_trainer.rollouts.processes import Processes
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts, PromptRow
from rlr_trainer.rollouts.scorer import Scorer
from rlr_trainer.training.evaluator import Evaluator, FixedPictures, eval_source

TEXTS = ["a", "aa", "aaa", "aaaa", "aaaaa"]
ROWS = [{"prompt": text, "digit": number} for number, text in enumerate(TEXTS)]
STREAMS = [(i,) for i in range(5)]


class Evaluation:
    """An evaluator of a tiny run."""

    def __init__(self, reward=brightness, batch_size=2, own=None, averaged=contextlib.nullcontext):
        self.run = tiny_run()
        scorer = Scorer(self.run.scorer.adapter, self.run.scorer.layout, Rewards(reward))
        self.evaluator = Evaluator(self.run.sampler.apart(), scorer, own or processes(), batch_size, averaged)

    def generate(self, texts=TEXTS, seed=0):
        return self.evaluator.generate(self.run.policy, [PromptRow(text, {}) for text in texts], STREAMS[: len(texts)], seed)

    def evaluate(self, rows=ROWS, repeats=1, **how):
        return self.evaluator.evaluate(self.run.policy, eval_source(rows), repeats, 0, "the evaluation", **how)


def test_pictures_depend_on_seed_and_number_not_on_the_batch():
    pictures = Evaluation().generate()
    assert pictures.shape == (5, 3, 2, 2)
    torch.testing.assert_close(Evaluation(batch_size=5).generate(), pictures, rtol=0, atol=1e-6)
    torch.testing.assert_close(Evaluation().generate(TEXTS[:3]), pictures[:3], rtol=0, atol=1e-6)
    assert not torch.allclose(Evaluation().generate(seed=1), pictures)


def test_the_rewards_are_those_of_the_generated_pictures():
    batches = []
    evaluation = Evaluation([brightness, lambda i, p, m: [1.0] * len(p)])
    metrics = evaluation.evaluate(on_batch=lambda: batches.append(1))
    expected = evaluation.generate().mean((1, 2, 3))
    assert metrics["reward"] == pytest.approx(float(expected.mean()) + 1)
    assert metrics["reward_std"] == pytest.approx(float(expected.std(correction=0)), rel=1e-4)
    assert metrics["rewards/brightness/mean"] == pytest.approx(float(expected.mean()))
    assert metrics.keys() == set(evaluation.evaluator.metric_names(eval_source(ROWS), 1))
    assert (len(batches), evaluation.evaluator.queries) == (3, 5)
    assert evaluation.evaluate() == metrics


def test_several_pictures_per_prompt_keep_the_first_and_add_others():
    seen = []

    def keep(images, prompts, metadata):
        seen.extend(zip(prompts, images, metadata, strict=True))
        return brightness(images, prompts, metadata)

    evaluation = Evaluation(keep)
    evaluation.evaluate()
    single = list(seen)
    seen.clear()
    evaluation.evaluate(repeats=3)
    assert [(prompt, m["digit"]) for prompt, _, m in seen] == [
        (text, number) for number, text in enumerate(TEXTS) for _ in range(3)
    ]
    for one, three in zip(single, seen[::3], strict=True):
        torch.testing.assert_close(three[1], one[1], rtol=0, atol=1e-6)
    assert len({round(float(image.sum()), 4) for _, image, _ in seen}) == 15  # no picture twice


def test_diversity_is_that_of_the_pictures_of_a_prompt():
    seen = []

    def keep(images, prompts, metadata):
        seen.append((images.clone(), prompts))
        return brightness(images, prompts, metadata)

    evaluation = Evaluation(keep)
    assert "diversity" not in evaluation.evaluate()
    seen.clear()
    metrics = evaluation.evaluate(repeats=3)
    expected = diversity(torch.cat([images for images, _ in seen]), [prompt for _, prompts in seen for prompt in prompts])
    assert metrics["diversity"] == pytest.approx(expected) and expected > 0
    assert metrics.keys() == set(evaluation.evaluator.metric_names(eval_source(ROWS), 3))


def test_it_leaves_no_trace_and_sees_the_averaged_weights():
    entered = []

    @contextlib.contextmanager
    def averaged():
        entered.append(True)
        yield

    def noisy(images, prompts, metadata):
        return torch.rand(len(prompts)) + random.random() + np.random.rand()

    evaluation = Evaluation(noisy, averaged=averaged)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    evaluation.evaluate()
    assert entered == [True]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    assert len(evaluation.run.sampler.cache) == 0  # prompts are encoded in a cache of its own


def test_pictures_without_a_reward_are_dropped_and_counted():
    metrics = Evaluation(lambda i, p, m: [None if row["digit"] % 2 else 1.0 for row in m]).evaluate()
    assert (metrics["reward"], metrics["samples_dropped"]) == (1, 2)
    with pytest.raises(RewardError, match="evaluation: all 5 rewards are NaN or None; check the evaluation reward"):
        Evaluation(lambda i, p, m: [math.nan] * len(p)).evaluate()


def test_group_wise_rewards_do_not_evaluate():
    @groupwise
    def rank(images, prompts, metadata):
        return list(range(len(prompts)))

    evaluation = Evaluation(rank)
    with pytest.raises(ValueError, match="pass another eval_reward_function"):
        evaluation.evaluate()
    values, pictures = evaluation.evaluator.score(
        evaluation.run.policy, [PromptRow("a", {})] * 2, STREAMS[:2], 0, "the pictures", keep=lambda pictures: pictures
    )
    assert (torch.isnan(values).all(), len(pictures), evaluation.evaluator.queries) == (True, 2, 0)  # shown without rewards


def test_sources():
    assert eval_source(None) is None
    assert {name: len(prompts) for name, prompts in eval_source({"low": ROWS[:2], "high": ROWS[2:]}).items()} == {
        "low": 2,
        "high": 3,
    }
    with pytest.raises(ValueError, match="names no dataset"):
        eval_source({})


def fixed(prompts, count):
    evaluation = Evaluation()
    return FixedPictures(evaluation.evaluator, prompts, count, at_most=3), evaluation.run.policy


def test_fixed_pictures_are_of_the_first_prompts():
    dataset = DatasetPrompts([{"prompt": text} for text in TEXTS], 0, shuffle=False)
    dataset.take(2)
    assert [row.prompt for row, _ in fixed(dataset, 3)[0].rows()] == TEXTS[:3]
    pictures, policy = fixed(dataset, 7)  # more than there are prompts: several of each, with other noise
    rows = pictures.rows()
    assert [row.prompt for row, _ in rows] == ["a", "a", "aa", "aa", "aaa", "aaaa", "aaaaa"]
    assert [stream for _, stream in rows[:4]] == [(0,), (0, 1), (1,), (1, 1)]
    first, again = pictures.take(policy, 0), pictures.take(policy, 0)
    assert torch.equal(first.images, again.images) and torch.equal(first.rewards, again.rewards)
    assert dataset.taken == 2


def test_the_prompts_of_a_function_are_kept_for_a_resumed_run():
    texts = iter(TEXTS)
    prompts = FunctionPrompts(lambda: (next(texts), {"n": 1}))
    begun, _ = fixed(prompts, 4)
    assert [row.prompt for row, _ in begun.rows()] == ["a", "a", "aa", "aaa"]  # no more than a rollout takes
    prompts.take(3)  # the function has gone on since
    resumed, _ = fixed(prompts, 4)
    resumed.load_state_dict(begun.state_dict())
    assert resumed.rows() == begun.rows()


def test_prompts_that_a_checkpoint_cannot_hold_are_left_out_of_it():
    pictures, _ = fixed(FunctionPrompts(lambda: ("a", object())), 4)
    assert pictures.rows() and pictures.state_dict() == []


class TwoProcesses:
    """Stands for a second process in the arithmetic of sharding: both shares are computed one after the other."""

    num_processes = 2

    def __init__(self, accelerator, rank, store):
        self._accelerator, self.process_index, self._store = accelerator, rank, store

    def __getattr__(self, name):
        return getattr(self._accelerator, name)

    def gather(self, tensor):
        calls = self._store.setdefault(self.process_index, [])
        calls.append(tensor)
        other = self._store.get(1 - self.process_index, [])
        mate = other[len(calls) - 1] if len(other) >= len(calls) else torch.zeros_like(tensor)
        return torch.cat([mate, tensor] if self.process_index else [tensor, mate])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_shares_of_two_processes_make_the_whole(count):
    """Also where the second has nothing to do: it samples a picture that does not count."""
    whole, expected = Evaluation().generate(TEXTS[:count]), Evaluation().evaluate(ROWS[:count])
    accelerator = processes().accelerator
    pictures, rewards, calls = {}, {}, []
    for rank in (0, 1):
        evaluation = Evaluation(own=Processes(TwoProcesses(accelerator, rank, pictures)))
        evaluation.run.policy.denoiser.register_forward_hook(lambda *arguments, rank=rank: calls.append(rank))
        shared = evaluation.generate(TEXTS[:count])
        evaluation.evaluator.processes = Processes(TwoProcesses(accelerator, rank, rewards))
        metrics = evaluation.evaluate(ROWS[:count])
    torch.testing.assert_close(shared, whole, rtol=0, atol=1e-6)
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert calls.count(0) == calls.count(1)  # sharded models need every process in every call
