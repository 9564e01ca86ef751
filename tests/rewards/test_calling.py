"""How reward functions are called: pieces, groups, threads, time limits, failures. No trainer."""

import asyncio
import concurrent.futures
import logging
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from rlr_trainer.estimators import NonDifferentiableRewardError
from rlr_trainer.rewards import RewardError, Rewards, groupwise
from rlr_trainer.rewards.aggregation import normalize_in_groups, normalize_then_sum
from rlr_trainer.rewards.interface import RewardCalls
from rlr_trainer.rewards.values import merge_notes


def batch(count, first=0, prompts=None):
    """Pictures whose every pixel is their number; numbers as metadata."""
    images = torch.arange(first, first + count).float().reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 100
    return images, tuple(prompts or (f"p{i}" for i in range(first, first + count))), tuple(range(first, first + count))


def number(images, prompts, metadata):
    """The number of each picture, read from the picture; checks that prompts and metadata came with it."""
    found = [round(float(image.mean()) * 100) for image in images]
    assert list(metadata) == found
    return found


def score(function, *batches, **options):
    """Results of consecutive batches."""
    calls = RewardCalls(Rewards(function, **options))
    try:
        for one in batches:
            calls.add(*one)
        return calls.finish()
    finally:
        calls.close()


# ---- pieces ----


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("size", [2, 9])
def test_pieces_give_what_one_call_gives(size, asynchronous):
    sizes = []

    def reward(images, prompts, metadata):
        sizes.append(len(prompts))
        return number(images, prompts, metadata), {"prompt": list(prompts), "tensor": images.mean((1, 2, 3)), "kind": "x"}

    rewards = Rewards(reward, batch_size=size, asynchronous=asynchronous)
    result = rewards(*batch(5), differentiable=False)
    assert result.total.tolist() == [0, 1, 2, 3, 4]
    assert sizes == [min(size, 5 - first) for first in range(0, 5, size)]
    assert rewards.queries == 5
    assert result.metadata["prompt"] == [f"p{i}" for i in range(5)]
    assert torch.equal(result.metadata["tensor"], batch(5)[0].mean((1, 2, 3)))


def test_notes_of_several_calls():
    assert merge_notes(["only"], [3]) == "only"
    assert merge_notes([{}, {}], [2, 1]) == {}
    assert merge_notes([[1, 2], [3]], [2, 1]) == [1, 2, 3]
    assert merge_notes([(1, 2), np.array([3])], [2, 1]) == [1, 2, 3]
    assert merge_notes([torch.tensor([1, 2]), torch.tensor([3])], [2, 1]).tolist() == [1, 2, 3]
    assert merge_notes([{"a": [1, 2]}, {"a": [3]}], [2, 1]) == {"a": [1, 2, 3]}
    assert merge_notes([[1], [3]], [2, 1]) == [[1], [3]]  # not one entry per sample
    assert merge_notes([{"a": 1}, {"b": 1}], [2, 1]) == [{"a": 1}, {"b": 1}]
    assert merge_notes([torch.tensor(1.0), 2], [1, 1]) == [torch.tensor(1.0), 2]


# ---- groups ----


@groupwise
def rank(images, prompts, metadata):
    """Place of each picture among those of its prompt, from the darkest; notes with one entry per sample."""
    assert len(set(prompts)) == 1
    return images.mean((1, 2, 3)).argsort().argsort(), [f"{len(prompts)} of {prompts[0]}"] * len(prompts)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("sizes", [[12], [5, 7], [1] * 12])
def test_a_group_wise_reward_sees_whole_groups_however_they_are_sampled(sizes, asynchronous):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(12, 3, 2, 2, generator=generator)
    prompts = tuple("abc"[i // 4] for i in range(12))
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    batches = [(images[f : f + s], prompts[f : f + s], (None,) * s) for f, s in zip(firsts, sizes, strict=True)]
    results = score([rank, lambda i, p, m: i.mean((1, 2, 3))], *batches, group_size=4, asynchronous=asynchronous)
    assert [len(r.total) for r in results] == sizes
    brightness = images.mean((1, 2, 3))
    expected = torch.cat([group.argsort().argsort() for group in brightness.split(4)])
    assert torch.equal(torch.cat([r.parts["rank"] for r in results]), expected.float())
    torch.testing.assert_close(torch.cat([r.total for r in results]), expected + brightness)
    if sizes == [12]:
        assert results[0].metadata["rank"] == [f"4 of {prompt}" for prompt in prompts]


def test_groups_that_cannot_be():
    with pytest.raises(RewardError, match="whole groups of num_images_per_prompt=4 .* 2 are left over"):
        score(rank, batch(6, prompts=["a"] * 6), group_size=4)
    with pytest.raises(RewardError, match=r"got different prompts \(on 2 prompts: 'p0', 'p1'\)"):
        score(rank, batch(2), group_size=2)


def test_groupwise_marks_functions_and_classes():
    class Count:
        needs_group = True

        def __call__(self, images, prompts, metadata):
            return [len(prompts)] * len(prompts)

    assert score(Count(), batch(4, prompts=["a"] * 4), group_size=2)[0].total.tolist() == [2, 2, 2, 2]
    with pytest.raises(TypeError, match="wrap it in a function"):
        groupwise(Count().__call__)


# ---- threads ----


def test_async_results_do_not_depend_on_timing():
    finished = []

    def slow_first(images, prompts, metadata):
        time.sleep(0.15 if metadata[0] == 0 else 0.0)
        finished.append(metadata[0])
        return number(images, prompts, metadata)

    results = score([slow_first, number], *(batch(2, f) for f in (0, 2, 4)), asynchronous=True, workers=4)
    assert finished[-1] == 0
    assert [r.parts["slow_first"].tolist() for r in results] == [[0, 1], [2, 3], [4, 5]]
    assert [r.total.tolist() for r in results] == [[0, 2], [4, 6], [8, 10]]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_bound_the_calls_at_a_time(workers):
    running, most, lock = 0, 0, threading.Lock()

    def change(by):
        nonlocal running, most
        with lock:
            running += by
            most = max(most, running)

    def plain(images, prompts, metadata):
        change(1)
        time.sleep(0.05)
        change(-1)
        return number(images, prompts, metadata)

    async def coroutine(images, prompts, metadata):
        change(1)
        await asyncio.sleep(0.05)
        change(-1)
        return number(images, prompts, metadata)

    score([plain, coroutine], *(batch(1, f) for f in range(4)), asynchronous=True, workers=workers)
    assert most == workers


def test_coroutines_run_in_one_loop_with_or_without_threads():
    loops = set()

    class Remote:
        async def __call__(self, images, prompts, metadata):
            loops.add(asyncio.get_running_loop())
            await asyncio.sleep(0)
            assert not torch.is_grad_enabled()
            return number(images, prompts, metadata), {"note": list(prompts)}

    async def inside_another_loop():  # a notebook's
        return Rewards(Remote())(*batch(3), differentiable=False)

    for result in (
        score(Remote(), batch(3))[0],
        score(Remote(), batch(3), asynchronous=True)[0],
        score(Remote(), batch(3), timeout=5.0)[0],
        asyncio.run(inside_another_loop()),
    ):
        assert result.total.tolist() == [0, 1, 2]
        assert result.metadata == {"note": ["p0", "p1", "p2"]}
    assert len(loops) == 1


def test_the_first_failure_in_order_is_raised_not_the_first_in_time():
    def reward(images, prompts, metadata):
        time.sleep(0.1 if metadata[0] == 0 else 0.0)
        raise KeyError(f"batch {metadata[0]}")

    with pytest.raises(RewardError, match="raised KeyError: 'batch 0'") as caught:
        score(reward, batch(1, 0), batch(1, 1), asynchronous=True, workers=2)
    assert isinstance(caught.value.__cause__, KeyError)


def test_calls_that_have_not_begun_are_dropped_with_the_run():
    begun, release = [], threading.Event()

    def reward(images, prompts, metadata):
        begun.append(metadata[0])
        release.wait(5)
        return [0.0]

    calls = RewardCalls(Rewards(reward, asynchronous=True))
    for first in range(3):
        calls.add(*batch(1, first))  # comes back while the first call runs
    deadline = time.monotonic() + 5
    while not begun and time.monotonic() < deadline:
        time.sleep(0.001)
    workers = [thread for thread in threading.enumerate() if thread.name == "rlr-reward-worker"]
    calls.close()
    release.set()
    for thread in workers:
        thread.join(5)
        assert not thread.is_alive()
    assert begun == [0]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit, Stop])
@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_what_is_no_exception_passes_through_as_it_is(stop, kind):
    """From every thread, and it breaks neither the threads nor the event loop."""

    def plain(images, prompts, metadata):
        raise stop("because")

    async def coroutine(images, prompts, metadata):
        raise stop("because")

    function = {"plain": plain, "coroutine": coroutine}[kind]
    for options in ({}, {"asynchronous": True}, {"timeout": 5.0}, {"asynchronous": True, "timeout": 5.0, "on_error": "skip"}):
        found = []

        def attempt(options=options, found=found):
            try:
                score(function, batch(2), **options)
            except stop as error:
                found.extend(error.args)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(10)
        assert found == ["because"], options
        assert score(number, batch(2), asynchronous=True)[0].total.tolist() == [0, 1]


@groupwise
def grouped(images, prompts, metadata):
    return images.mean((1, 2, 3))


async def coroutine(images, prompts, metadata):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (number, {"asynchronous": True}, "async_rewards=True calls rewards in threads, without a graph"),
        (grouped, {"group_size": 2}, "'grouped' is group-wise: a black box"),
        (coroutine, {}, "'coroutine' is an async function"),
    ],
)
def test_no_gradient_of_these(function, options, message):
    with pytest.raises(NonDifferentiableRewardError, match=message):
        Rewards(function, **options)(*batch(2, prompts="aa"), differentiable=True)


# ---- time limits ----


def test_a_call_that_takes_too_long():
    release = threading.Event()

    def hanging(images, prompts, metadata):
        release.wait(10)
        return [0.0] * len(prompts)

    for asynchronous in (False, True):
        started = time.perf_counter()
        with pytest.raises(
            RewardError,
            match=r"'hanging' did not return within reward_timeout=0.1 seconds .*on 4 prompts: 'p0', 'p1', 'p2' and 1 more",
        ):
            score(hanging, batch(4), timeout=0.1, asynchronous=asynchronous)
        assert time.perf_counter() - started < 5
    release.set()


def test_a_coroutine_that_takes_too_long_is_cancelled():
    events = []

    async def hanging(images, prompts, metadata):
        try:
            await asyncio.sleep(10)
        finally:
            events.append("cancelled")

    with pytest.raises(RewardError, match="reward_timeout=0.1"):
        score(hanging, batch(2), timeout=0.1)
    deadline = time.monotonic() + 5
    while not events and time.monotonic() < deadline:
        time.sleep(0.01)
    assert events == ["cancelled"]


def test_a_gradient_within_a_time_limit():
    images = torch.rand(3, 3, 2, 2).requires_grad_(True)
    total = Rewards(lambda i, p, m: i.sum((1, 2, 3)), timeout=5.0)(images, *batch(3)[1:], differentiable=True).total
    assert torch.equal(torch.autograd.grad(total.sum(), images)[0], torch.ones_like(images))
    with torch.no_grad():
        assert not Rewards(lambda i, p, m: i.sum((1, 2, 3)), timeout=5.0)(
            images, *batch(3)[1:], differentiable=False
        ).total.requires_grad


@pytest.mark.medium
def test_a_hung_reward_does_not_keep_the_program_alive():
    program = (
        "import time, torch\n"
        "from rlr_trainer.rewards.interface import Rewards\n"
        "rewards = Rewards(lambda i, p, m: time.sleep(600), timeout=0.1, asynchronous=True)\n"
        "rewards(torch.zeros(1, 3, 2, 2), ('a',), ({},), differentiable=False)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "RewardError" in done.stderr
    assert "did not return within" in done.stderr


# ---- failures ----


@pytest.mark.parametrize("options", [{}, {"timeout": 5.0}, {"asynchronous": True}], ids=str)
def test_a_cancelled_task_in_a_reward_is_a_failure_like_others(options):
    """asyncio.CancelledError is no Exception."""

    def reward(images, prompts, metadata):
        if metadata[0] == 0:
            raise asyncio.CancelledError("by the server")
        return number(images, prompts, metadata)

    async def coroutine(images, prompts, metadata):
        return reward(images, prompts, metadata)

    for function in (reward, coroutine):
        with pytest.raises(RewardError, match=r"raised CancelledError: .*\(on 1 prompts") as caught:
            score(function, batch(1, 0), **options)
        assert isinstance(caught.value.__cause__, asyncio.CancelledError | concurrent.futures.CancelledError)
        skipped, other = score(function, batch(1, 0), batch(1, 1), on_error="skip", **options)
        assert torch.isnan(skipped.total).all()
        assert other.total.tolist() == [1]


def test_the_message_names_reward_place_and_prompts_and_keeps_the_cause():
    def broken(images, prompts, metadata):
        raise ConnectionError("no route")

    with pytest.raises(RewardError) as caught:
        Rewards(broken)(*batch(5), differentiable=False, where="sampling batch 2 of rollout 7")
    assert str(caught.value) == (
        "reward 'broken' raised ConnectionError: no route (in sampling batch 2 of rollout 7, on 5 prompts: 'p0', 'p1', 'p2' and 2 more)"
    )
    assert isinstance(caught.value.__cause__, ConnectionError)

    with pytest.raises(RewardError, match=r"returned shape \(1,\) .*\(in here, on 2 prompts: 'p0', 'p1'\)"):
        Rewards(lambda i, p, m: [1.0])(*batch(2), differentiable=False, where="here")

    def impatient(images, prompts, metadata):
        raise TimeoutError("the server did not answer")

    with pytest.raises(RewardError, match="raised TimeoutError: the server did not answer"):  # its own, not reward_timeout's
        score(impatient, batch(2), timeout=5.0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_skipping_drops_the_samples_of_the_call_from_the_sum(asynchronous, caplog):
    def flaky(images, prompts, metadata):
        if 2 in metadata:
            raise OSError("gone")
        if 4 in metadata:
            return [1.0, 2.0, 3.0]
        return number(images, prompts, metadata)

    rewards = Rewards([flaky, number], batch_size=2, on_error="skip", asynchronous=asynchronous)
    with caplog.at_level(logging.WARNING):
        result = rewards(*batch(8), differentiable=False)
    dropped = [2, 3, 4, 5]
    assert torch.isnan(result.total).nonzero()[:, 0].tolist() == dropped
    assert result.total[[0, 1, 6, 7]].tolist() == [0, 2, 12, 14]
    assert torch.isnan(result.parts["flaky"]).nonzero()[:, 0].tolist() == dropped
    assert result.parts["number"].tolist() == list(range(8))  # it was computed, and only the sum lacks it
    assert result.errors == rewards.failures == 2
    assert rewards.queries == 8
    assert [record.message.split(". Its")[0] for record in caplog.records] == [
        "reward 'flaky' failed: OSError: gone",
        "reward 'flaky' failed: rlr_trainer.rewards.values.RewardError: reward 'flaky' returned shape (3,) for a batch of 2: must be (2,), one "
        "number per sample in the order of the pictures (a batch mean, or an extra dimension, has to go)",
    ]


def test_a_skipped_call_has_no_gradient_and_leaves_the_others():
    images = torch.rand(4, 3, 2, 2).requires_grad_(True)

    def flaky(images, prompts, metadata):
        if 0 in metadata:
            raise OSError
        return images.sum((1, 2, 3))

    rewards = Rewards(flaky, batch_size=2, on_error="skip")
    result = rewards(images, *batch(4)[1:], differentiable=True)
    (gradient,) = torch.autograd.grad(result.total.nan_to_num().sum(), images)
    assert torch.equal(gradient, torch.ones_like(images) * torch.tensor([0.0, 0, 1, 1]).reshape(-1, 1, 1, 1))
    with pytest.raises(NonDifferentiableRewardError):  # a missing graph is never skipped
        Rewards(lambda i, p, m: i.detach().sum((1, 2, 3)), on_error="skip")(*batch(2), differentiable=True)


def test_warnings_become_rare(caplog):
    rewards = Rewards(number, on_error="skip")
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            rewards.count_failure("reward 'number'", 1, OSError())
    assert rewards.failures == 100
    assert [int(record.message.split("number ")[1].split()[0]) for record in caplog.records] == [1, 2, 3, 4, 8, 16, 32, 64]


# ---- each reward normalized before the sum ----


def test_normalize_then_sum_by_hand():
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(12, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.01, 1.0, 100.0]) + torch.tensor(
        [5.0, -3.0, 0.0]
    )
    groups, weights = torch.arange(12) // 4, [1.0, 0.5, -2.0]
    advantages, factors = normalize_then_sum(rewards, weights, lambda k, values: normalize_in_groups(values, groups))

    grouped = rewards.reshape(3, 4, 3)
    std = grouped.std(1, keepdim=True, correction=0) + 1e-8
    each = ((grouped - grouped.mean(1, keepdim=True)) / std).reshape(12, 3)
    total = (each * torch.tensor(weights)).sum(1)
    whole = total.std(correction=0) + 1e-8
    torch.testing.assert_close(advantages.values, (total - total.mean()) / whole)
    torch.testing.assert_close(factors, torch.tensor(weights) / std.expand(3, 4, 3).reshape(12, 3) / whole)
    assert torch.equal(advantages.scale, torch.ones(12, dtype=torch.float64))


def test_normalize_then_sum_leaves_out_what_does_not_apply():
    nan = torch.nan
    rewards = torch.tensor([[1.0, nan], [2.0, 5.0], [nan, nan], [4.0, 6.0]], dtype=torch.float64)
    advantages, factors = normalize_then_sum(rewards, [1.0, 1.0], lambda k, values: normalize_in_groups(values, None))
    first = (torch.tensor([1.0, 2.0, 4.0]) - 7 / 3) / torch.tensor([1.0, 2.0, 4.0]).std(correction=0)
    total = first + torch.tensor([0.0, -1.0, 1.0])
    expected = (total - total.mean()) / total.std(correction=0)
    torch.testing.assert_close(advantages.values[[0, 1, 3]].float(), expected, rtol=1e-6, atol=1e-6)
    assert advantages.values[2] == 0
    assert factors[2].tolist() == [0, 0]
    assert factors[0, 1] == 0
    assert advantages.scale.tolist() == [1, 1, 0, 1]
