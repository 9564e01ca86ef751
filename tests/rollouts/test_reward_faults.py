"""Rewards inside the trainer: faults in the middle of a run, and the options of how rewards are called and summed."""

import copy
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from programs import environment, torchrun
from transformers import TrainerCallback
from warm_weights import warm_lora

from rlr_trainer import RewardError, RLRConfig, digits
from rlr_trainer.digits.rewards import ink
from rlr_trainer.estimators import NonDifferentiableRewardError
from rlr_trainer.rewards import groupwise
from rlr_trainer.rollouts.collector import Collector

WORKER = Path(__file__).parents[1] / "reward_fault_worker.py"
SMALL = {"sample_num_steps": 2, "fo_steps": 1, "num_log_images": 0, "check_reward": False, "output_dir": "run"}
SCORED = SMALL | {"estimator": "ddpo", "fo_steps": None}


class Gradients(TrainerCallback):
    def __init__(self):
        self.updates = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.updates.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture
def warm(pipeline):
    return warm_lora(pipeline)


@pytest.fixture
def first_gradient(make_trainer, warm):
    """Trains one update from the same weights, and gives the trainer and its gradient, unclipped."""
    runs = 0

    def train(**options):
        nonlocal runs
        runs += 1
        recorder = Gradients()
        given = {
            "output_dir": f"run{runs}",
            "max_steps": 1,
            "sample_num_steps": 3,
            "max_grad_norm": 0.0,
            "num_log_images": 0,
            "check_reward": False,
        } | options
        trainer = make_trainer(sd_pipeline=copy.deepcopy(warm), callbacks=[recorder], **given)
        trainer.train()
        return trainer, recorder.updates[0]

    return train


def assert_same(left, right, relative):
    assert left.keys() == right.keys()
    assert left
    largest = max(float(tensor.abs().max()) for tensor in right.values())
    assert largest > 0
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=relative * largest, msg=lambda m, n=name: f"{n}: {m}")


def first_row(trainer):
    return next(row for row in trainer.state.log_history if "loss" in row)


class FailsOnCall:
    """The share of ink; the calls in `calls` fail (the first is number 1)."""

    def __init__(self, *calls, fail=None):
        self.calls, self.count, self.fail = calls, 0, fail or self.broken

    def broken(self):
        raise ConnectionError("the server went away")

    def __call__(self, images, prompts, metadata):
        self.count += 1
        return self.fail() if self.count in self.calls else ink(images, prompts, metadata)


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}


# ---- a reward that fails in the middle ----


@pytest.mark.parametrize(
    ("fail", "message", "cause"),
    [
        (None, "reward 'FailsOnCall' raised ConnectionError: the server went away", ConnectionError),
        (lambda: torch.ones(3), r"reward 'FailsOnCall' returned shape \(3,\) for a batch of 2", RewardError),
    ],
)
@pytest.mark.medium
def test_the_error_tells_where(make_trainer, fail, message, cause):
    # rollouts of two sampling batches: the 6th call is the second batch of the third rollout, counted from 0
    options = SMALL | {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(reward_function=FailsOnCall(6, fail=fail), **options)
    with pytest.raises(
        RewardError, match=f"{message}.*in sampling batch 1 of rollout 2, on 2 prompts: '{digits.PROMPT}'"
    ) as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize("options", [SMALL, SCORED, SCORED | {"async_rewards": True}], ids=["gradient", "black box", "async"])
@pytest.mark.medium
def test_skipping_goes_on_without_the_samples_and_counts_them(make_trainer, options):
    reward = FailsOnCall(2, 3)
    trainer = make_trainer(
        reward_function=reward,
        on_reward_error="skip",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        **options,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["reward_errors"] for row in rows] == [1, 1]
    assert [row["samples_dropped"] for row in rows] == [2, 2]
    assert [row["reward_queries"] for row in rows] == [4, 8]
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer).values())


@pytest.mark.parametrize("options", [SMALL, SCORED], ids=["gradient", "black box"])
@pytest.mark.medium
def test_a_skipped_sample_is_as_one_without_a_reward(first_gradient, options):
    """The other samples give the gradient that they give when the reward itself says None."""
    calls = 0

    def says_none(images, prompts, metadata):
        nonlocal calls
        calls += 1
        values = ink(images, prompts, metadata)
        return torch.nan * values if calls == 2 else values

    options = {"per_device_train_batch_size": 4, "reward_batch_size": 2, "sample_num_steps": 2, **{k: options.get(k) for k in ("fo_steps",)},
               "estimator": options.get("estimator", "rlr"), "on_reward_error": "skip"}  # fmt: skip
    _, none = first_gradient(reward_function=says_none, **options)
    trainer, skipped = first_gradient(reward_function=FailsOnCall(2), **options)
    assert first_row(trainer)["samples_dropped"] == 2
    assert_same(skipped, none, 1e-6)


@pytest.mark.medium
def test_a_rollout_that_fails_altogether_ends_the_run(make_trainer):
    def broken(images, prompts, metadata):
        raise ConnectionError("no route")

    trainer = make_trainer(reward_function=broken, on_reward_error="skip", **SCORED)
    with pytest.raises(RewardError, match=r"all 4 rewards are NaN or None.*\(1 calls failed; .*ConnectionError: no route\)"):
        trainer.train()


def test_the_check_before_the_first_rollout_skips_nothing(make_trainer, monkeypatch):
    trainer = make_trainer(reward_function=FailsOnCall(1), on_reward_error="skip", **SCORED | {"check_reward": True})
    monkeypatch.setattr(Collector, "collect", lambda *arguments: pytest.fail("sampled before the reward was tried"))
    with pytest.raises(RewardError, match="the server went away .*the check of the reward before the first rollout"):
        trainer.train()


@pytest.mark.medium
def test_a_hanging_reward_ends_the_run(make_trainer):
    release = threading.Event()

    def hanging(images, prompts, metadata):
        release.wait(20)
        return ink(images, prompts, metadata)

    trainer = make_trainer(reward_function=hanging, reward_timeout=0.2, **SMALL)
    with pytest.raises(RewardError, match=r"'hanging' did not return within reward_timeout=0.2 seconds.*batch 0 of rollout 0"):
        trainer.train()
    release.set()


@pytest.mark.parametrize("options", [SMALL, SCORED | {"async_rewards": True}])
@pytest.mark.medium
def test_an_interrupt_in_the_reward_passes_through(make_trainer, options):
    def interrupted(images, prompts, metadata):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(reward_function=interrupted, on_reward_error="skip", **options).train()


@pytest.mark.slow
def test_a_failure_in_one_process_ends_all(tmp_path):
    command = torchrun(2, WORKER, tmp_path)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    check = "the check of the reward before the first rollout"
    for when, where, updates, calls in (
        ("check", check, 0, (1, 1)),
        ("first batch", "rollout 0", 0, (3, 2)),
        ("second rollout", "rollout 1", 1, (5, 4)),
    ):
        first, second = ((tmp_path / f"{when} {rank}.txt").read_text() for rank in (0, 1))
        assert first.startswith(f"{updates} updates, {calls[0]} calls: scoring failed on process 1 in {where}")
        assert second.startswith(f"{updates} updates, {calls[1]} calls: reward 'failing' raised OSError: the disk is full")
        assert second.endswith("| OSError")


# ---- pieces, threads, groups ----


@pytest.mark.parametrize("options", [{}, {"control_variate": True}], ids=str)
@pytest.mark.medium
def test_pieces_do_not_change_the_update_and_bound_the_memory(first_gradient, seven, options):
    sizes = []

    def reward(images, prompts, metadata):
        sizes.append(len(prompts))
        return seven(images, prompts, metadata)

    _, whole = first_gradient(reward_function=seven, **options)
    trainer, pieces = first_gradient(reward_function=reward, reward_batch_size=3, **options)
    assert_same(pieces, whole, 1e-4)
    assert max(sizes) == 3
    if not options:
        assert first_row(trainer)["reward_queries"] == 4


@pytest.mark.medium
def test_the_decoder_sees_pieces_too_when_it_is_differentiated(make_trainer, seven):
    trainer = make_trainer(reward_function=seven, reward_batch_size=1, max_steps=1, **SMALL)
    sizes, decode = [], trainer.adapter.decode
    trainer.adapter.decode = lambda latents, layout: sizes.append(len(latents)) or decode(latents, layout)
    trainer.train()
    assert sizes == [1, 1, 1, 1]


@pytest.mark.medium
def test_async_rewards_give_the_same_update(first_gradient, seven):
    def slow_first(images, prompts, metadata):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.1 * (4 - len(seen)))
        seen.append(len(prompts))
        return seven(images, prompts, metadata)

    async def remote(images, prompts, metadata):
        return ink(images, prompts, metadata)

    options = {
        "estimator": "ddpo",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "reward_function": [slow_first, remote],
    }
    seen: list[int] = []
    _, plain = first_gradient(**options)
    seen.clear()
    trainer, threaded = first_gradient(async_rewards=True, reward_workers=3, **options)
    assert seen == [1, 1, 1, 1]
    for name in plain:
        assert torch.equal(plain[name], threaded[name]), name
    assert first_row(trainer)["reward_queries"] == 4


@pytest.mark.medium
def test_async_rewards_run_while_the_next_batch_is_sampled(make_trainer):
    """Events, not seconds: the first reward waits for the second batch's sampling, which a call in turn would never see."""
    sampling_again = threading.Event()
    overlapped = []

    def reward(images, prompts, metadata):
        if not overlapped:
            overlapped.append(sampling_again.wait(20))
        return ink(images, prompts, metadata)

    trainer = make_trainer(
        reward_function=reward,
        async_rewards=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        **SCORED,
    )
    decode, decoded = trainer.adapter.decode, []

    def decode_and_tell(latents, layout):
        decoded.append(len(latents))
        if len(decoded) == 2:
            sampling_again.set()
        return decode(latents, layout)

    trainer.adapter.decode = decode_and_tell
    trainer.train()
    assert overlapped == [True]


@groupwise
def rank(images, prompts, metadata):
    """Place among the pictures of the prompt, from the darkest."""
    assert len(set(prompts)) == 1
    assert [m["row"] for m in metadata] == [metadata[0]["row"]] * len(prompts)
    return images.mean((1, 2, 3)).argsort().argsort()


@pytest.mark.parametrize(("batch", "async_rewards"), [(1, True), (2, False)])
@pytest.mark.medium
def test_groups_across_sampling_batches_give_the_same_update(first_gradient, batch, async_rewards):
    rows = [{"prompt": digits.class_prompt(d), "row": d} for d in range(3)]
    options = {"reward_function": [rank, ink], "train_dataset": rows, "num_images_per_prompt": 4, "estimator": "ddpo", "check_reward": True,
               "shuffle_prompts": False}  # fmt: skip
    _, whole = first_gradient(per_device_train_batch_size=8, **options)
    trainer, split = first_gradient(
        per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, async_rewards=async_rewards, **options
    )
    assert_same(split, whole, 1e-4)
    assert first_row(trainer)["rewards/rank/mean"] == 1.5
    assert first_row(trainer)["reward_queries"] == 8 + 4  # the check took one whole group


# ---- each reward normalized before the sum ----


def bright(images, prompts, metadata):
    return 100 * images.mean((1, 2, 3))


def contrast(images, prompts, metadata):
    return images.flatten(1).std(1)


def normalized_by_hand(group):
    """The objective that normalize_then_sum differentiates, as one reward of a batch that is the whole rollout."""

    def combined(images, prompts, metadata):
        total = torch.zeros(len(prompts))
        for weight, reward in ((1.0, bright), (-0.5, contrast)):
            values = reward(images, prompts, metadata).reshape(-1, group)
            held = values.detach().double()
            mean, std = held.mean(1, keepdim=True), held.std(1, keepdim=True, correction=0)
            total = total + weight * ((values - mean) / std).float().flatten()
        held = total.detach().double()
        return ((total - held.mean()) / held.std(correction=0)).float()

    return combined


@pytest.mark.parametrize(
    ("plan", "group"),
    [
        ({"estimator": "rlr", "fo_steps": 2, "ho_length": 1}, 1),
        ({"estimator": "rlr", "fo_steps": 2, "ho_length": 1}, 4),
        pytest.param({"estimator": "rlr_paper", "zo_num_perturbations": 2}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.medium
def test_all_parts_estimate_the_gradient_of_the_normalized_objective(first_gradient, plan, group):
    options = plan | {"num_images_per_prompt": group, "per_device_train_batch_size": 8, "adv_clip_max": 100.0}
    _, expected = first_gradient(
        reward_function=normalized_by_hand(group if group > 1 else 8), advantage="none", reward_batch_size=8, **options
    )
    trainer, found = first_gradient(
        reward_function=[bright, contrast],
        reward_weights=[1.0, -0.5],
        reward_aggregation="normalize_then_sum",
        reward_batch_size=3,
        **options,
    )
    assert trainer.args.advantage_name == "normalize"
    assert_same(found, expected, 1e-3)
    row = first_row(trainer)
    assert row["reward"] == pytest.approx(row["rewards/bright/mean"] - 0.5 * row["rewards/contrast/mean"], rel=1e-5)


@pytest.mark.medium
def test_per_prompt_statistics_of_every_reward(make_trainer):
    rows = [{"prompt": digits.class_prompt(d)} for d in range(2)]
    trainer = make_trainer(
        reward_function=[bright, contrast], train_dataset=rows, num_images_per_prompt=2, advantage="per_prompt",
        reward_aggregation="normalize_then_sum", per_prompt_min_count=2, **SMALL,
    )  # fmt: skip
    trainer.train()
    names = [f"{reward}\n{digits.class_prompt(d)}" for reward in ("bright", "contrast") for d in range(2)]
    assert sorted(trainer.statistics.buffers) == sorted(names)
    assert all(len(buffer) == 4 for buffer in trainer.statistics.buffers.values())


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_aggregation": "sum"}, "reward_aggregation='sum': must be one of sum_then_normalize, normalize_then_sum"),
        ({"on_reward_error": "ignore"}, "on_reward_error='ignore': must be one of raise, skip"),
        ({"reward_timeout": 0.0}, "reward_timeout=0.0: must be a positive number of seconds"),
        ({"reward_batch_size": 0}, "reward_batch_size=0: must be a whole number"),
        ({"reward_workers": 0, "async_rewards": True}, "reward_workers=0: must be a whole number"),
        ({"reward_workers": 2}, "reward_workers=2: .* set async_rewards=True"),
        ({"lora_target_modules": []}, r"lora_target_modules=\[\]: must name at least one module"),
        ({"reward_aggregation": "normalize_then_sum", "advantage": "leave_one_out"}, "advantage='leave_one_out': it divides by"),
        ({"reward_aggregation": "normalize_then_sum", "control_variate": True}, "control_variate=True: predictions are scored with the plain"),
        ({"reward_aggregation": "normalize_then_sum", "estimator": "sqdf"}, "rest_estimator='prediction'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        RLRConfig(output_dir="x", use_cpu=True, **options)


async def remote(images, prompts, metadata):
    return ink(images, prompts, metadata)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"async_rewards": True}, NonDifferentiableRewardError, "estimator='rlr' needs the reward's gradient, but async_rewards=True"),
        ({"reward_function": remote}, NonDifferentiableRewardError, "'remote' is an async function"),
        ({"reward_function": rank, "num_images_per_prompt": 2}, NonDifferentiableRewardError, "'rank' is group-wise"),
        ({"reward_function": rank, "estimator": "ddpo"}, ValueError, "num_images_per_prompt=1: set it to 2 or more"),
        ({"reward_function": rank, "estimator": "ddpo", "num_images_per_prompt": 2, "eval_dataset": [{"prompt": "a"}]}, ValueError,
         "cannot score an eval_dataset"),
    ],
)  # fmt: skip
def test_rewards_that_do_not_fit_the_run_are_refused_at_once(make_trainer, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**options)


def test_a_group_spread_over_processes_is_refused():
    from rlr_trainer.rewards import Rewards
    from rlr_trainer.training.checks import check_rewards

    config = RLRConfig(
        output_dir="x",
        use_cpu=True,
        estimator="ddpo",
        num_images_per_prompt=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    check_rewards(Rewards(rank), config, config.plan, 1, False)
    with pytest.raises(ValueError, match="sample_batch_size=2 on 2 processes: .* a multiple of 4"):
        check_rewards(Rewards(rank), config, config.plan, 2, False)
