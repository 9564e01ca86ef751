"""The workbench computes the trainer's own updates, and leaves the run as it was."""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from rlr_trainer import RLRConfig, digits
from rlr_trainer.diagnosis import diagnose
from rlr_trainer.diagnosis.comparison import compose, is_composable
from rlr_trainer.diagnosis.gradients import GradientReader
from rlr_trainer.diagnosis.memory import measuring_memory
from rlr_trainer.diagnosis.step_profile import DEAD_GRADIENT, ProfileBuilder, start_profile
from rlr_trainer.diagnosis.workbench import measuring_advantages, measuring_options, untouched
from rlr_trainer.digits.rewards import ink
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.rewards import RewardError
from rlr_trainer.rollouts.advantage_rule import AdvantageRule
from rlr_trainer.rollouts.collector import RolloutOptions


def test_the_reader_concatenates_and_fills_gaps_with_zeros():
    params = {"a": torch.zeros(2, 2, requires_grad=True), "b": torch.zeros(3, requires_grad=True)}
    reader = GradientReader(params)
    (params["b"] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert reader.read().tolist() == [0, 0, 0, 0, 1, 2, 3]
    reader.clear()
    assert params["b"].grad is None
    assert reader.read().tolist() == [0] * 7


def test_the_sketch_keeps_inner_products():
    params = {"a": torch.zeros(300, 400), "b": torch.zeros(80_000)}
    reader = GradientReader(params, max_entries=2**14)
    assert reader.sketched
    generator = torch.Generator().manual_seed(13)
    first, other = ({name: torch.randn(p.shape, generator=generator) for name, p in params.items()} for _ in range(2))
    mixed = {name: first[name] + other[name] for name in params}
    exact = sum(float((first[name] * mixed[name]).sum()) for name in params)
    a, b = reader.flatten(first), reader.flatten(mixed)
    assert a.shape == (2**14,)
    scale = sum(float((first[name] ** 2).sum()) for name in params)
    assert abs(float(a @ b) - exact) < 5 * (2**0.5) * scale / 2**7
    torch.testing.assert_close(reader.flatten(other), b - a, atol=1e-3, rtol=0)  # linear
    ones = {name: torch.ones_like(p) for name, p in params.items()}  # structure must not line up with the signs
    assert float(reader.flatten(ones).square().sum()) == pytest.approx(200_000, rel=0.1)
    same = {name: torch.ones(1000) for name in "ab"}  # nor two parameters with each other
    reader = GradientReader(same, max_entries=1000)
    assert float(reader.flatten(same).square().sum()) == pytest.approx(2000, rel=0.3)


def test_live_bytes_follow_what_is_made_and_freed():
    weight, x = torch.randn(64, 64, requires_grad=True), torch.randn(100, 64)
    row = 100 * 64 * 4
    with measuring_memory(torch.device("cpu")) as meter:
        y = (x @ weight).relu()  # the product is freed, ReLU keeps its own output
        z = y.exp().sum()
        assert row * 2 <= meter.held() <= row * 2 + 64
        assert row * 2 <= meter.peak() <= row * 2 + 64
        z.backward()
        assert weight.grad is not None
        assert meter.peak() >= row * 3
        del y, z
        assert abs(meter.held() - 64 * 64 * 4) <= 64  # the gradient remains
        view = torch.zeros(1000)[10:]
        assert abs(meter.held() - 64 * 64 * 4 - 4000) <= 64
        del view
        assert abs(meter.held() - 64 * 64 * 4) <= 64


class Recorder(TrainerCallback):
    def __init__(self):
        self.update = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.update = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "rlr", "fo_steps": 1, "ho_length": 2, "control_variate": True},
        {"estimator": "sqdf", "num_images_per_prompt": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"estimator": "rlr_paper", "zo_num_perturbations": 1, "control_variate": True, "recompute": "graph"},
        {"estimator": "es", "zo_num_perturbations": 1, "num_images_per_prompt": 2, "advantage": "none"},
    ],
    ids=lambda options: options["estimator"],
)
@pytest.mark.medium
def test_an_update_is_the_trainers(make_trainer, options):
    recorder = Recorder()
    trainer = make_trainer(max_steps=1, max_grad_norm=0.0, callbacks=[recorder], **options)
    with untouched(trainer) as bench:
        bench.options = dataclasses.replace(
            bench.options, seed=trainer.args.seed
        )  # the training's own noise instead of the diagnosis's
        batch = bench.collect(0, trainer.plan)
        update, seconds = bench.update(trainer.plan, batch, bench.control_scale(trainer.plan))
    trainer.train()
    assert seconds > 0
    assert float(update.norm()) > 0
    torch.testing.assert_close(update, -recorder.update, rtol=0, atol=1e-5 * float(update.abs().max()))


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, (4, 1)),
        ({"gradient_accumulation_steps": 3}, (4, 3)),
        ({"sample_batch_size": 2}, (2, 2)),
        ({"sample_batch_size": 16, "num_inner_epochs": 2}, (4, 1)),  # a rollout for several updates: one update's are measured
        ({"sample_batch_size": 3, "sample_num_batches_per_epoch": 4}, (4, 1)),
        ({"sample_batch_size": 16, "num_images_per_prompt": 8}, (16, 1)),  # a group is not split
    ],
)
def test_a_measured_batch_has_the_samples_of_one_update(options, sampling):
    config = RLRConfig(use_cpu=True, per_device_train_batch_size=4, sample_num_steps=10, **options)
    size, number, group = config.sample_batch_size, config.sample_num_batches_per_epoch, config.num_images_per_prompt
    measuring = measuring_options(config, RolloutOptions(config.seed, size, number, group, offload=True))
    assert (measuring.batch_size, measuring.num_batches) == sampling
    assert measuring.seed != config.seed
    assert not measuring.offload


def test_advantages_are_plain():
    limited = AdvantageRule("normalize", limit=5.0, group_size=2, separately=True)
    assert measuring_advantages(limited) == AdvantageRule("leave_one_out", group_size=2)
    assert measuring_advantages(AdvantageRule("none")).name == "none"


@pytest.mark.medium
def test_composed_updates_are_those_of_the_plan(make_trainer):
    plans = [EstimatorPlan.from_preset(name, 4) for name in ("full_bp", "ddpo", "draft")]
    plans += [EstimatorPlan.from_preset("rlr", 4, fo_steps=3, ho_length=1)]
    with untouched(make_trainer(reward_function=ink)) as bench:
        builder = ProfileBuilder(bench, differentiable=True)
        batch = bench.collect(0, builder.reference)
        shares = builder.add(batch)
        for plan in plans:
            assert is_composable(plan)
            direct, _ = bench.update(plan, batch)
            torch.testing.assert_close(compose(plan, *shares), direct, rtol=0, atol=1e-5 * float(direct.abs().max()))
    for options in ({"ho_length": 2}, {"control_variate": True}, {"rest_num_steps": 1}, {"fo_weight": 2.0}):
        assert not is_composable(EstimatorPlan.from_preset("rlr", 4, fo_steps=1, **options))


def test_zeroth_order_shares_add_up_to_the_update(make_trainer):
    trainer = make_trainer(reward_function=ink, estimator="es", zo_num_perturbations=2)
    with untouched(trainer) as bench:
        batch = bench.collect(0, trainer.plan)
        update, _ = bench.update(trainer.plan, batch)
        torch.testing.assert_close(bench.zeroth_order_shares(batch).sum(0), update, rtol=0, atol=1e-5 * float(update.abs().max()))


@pytest.mark.medium
def test_a_reward_with_a_dead_graph_is_a_black_box(make_trainer):
    trainer = make_trainer(reward_function=lambda images, prompts, metadata: (images * 255).round().mean((1, 2, 3)))
    with untouched(trainer) as bench:
        builder, _, reason = start_profile(bench)
    assert reason == DEAD_GRADIENT
    assert not builder.differentiable
    assert not builder.reference.needs_differentiable_reward


# ---- nothing is touched ----


def snapshot(trainer):
    numpy_state = np.random.get_state(legacy=False)["state"]
    return {
        "weights": [p.clone() for p in trainer.model.parameters()],
        "random": [random.getstate(), numpy_state["key"].tolist(), numpy_state["pos"], torch.get_rng_state().tolist()],
        "modes": [module.training for module in trainer.model.modules()],
        "position": trainer.prompts.state_dict(),
        "control": copy.deepcopy(trainer.parts.plan_state.control_scale.state_dict()),
        "starts": copy.deepcopy(trainer.parts.plan_state.starts.state_dict()),
        "rollouts": trainer.parts.rollouts_done,
        "step": trainer.state.global_step,
    }


@pytest.mark.slow
def test_nothing_but_the_query_count_changes(make_trainer):
    dataset = [{"prompt": digits.class_prompt(d), "digit": d} for d in range(10)]
    trainer = make_trainer(
        train_dataset=dataset, reward_function=ink, ho_length=2, fo_steps=1, control_variate=True, ho_start="grad_norm", max_steps=1
    )
    trainer.train()
    trainer.model.train()
    params = list(trainer.policy.trainable_parameters().values())
    marks = [torch.full_like(p, 0.5) for p in params]
    for p, mark in zip(params, marks, strict=True):
        p.grad = mark
    queries, before = trainer.rewards.queries, snapshot(trainer)
    next_prompts = trainer.prompts.peek(20)
    diagnosis = diagnose(trainer, num_batches=1, time_limit=600)
    after = snapshot(trainer)
    assert all(torch.equal(a, b) for a, b in zip(before.pop("weights"), after.pop("weights"), strict=True))
    assert before == after
    assert trainer.prompts.peek(20) == next_prompts
    assert all(p.grad is mark and bool((mark == 0.5).all()) for p, mark in zip(params, marks, strict=True))
    assert diagnosis.settings["reward_queries"] == trainer.rewards.queries - queries > 0


@pytest.mark.medium
def test_state_is_restored_after_an_error(make_trainer):
    calls = []

    def failing(images, prompts, metadata):
        calls.append(random.random())
        if len(calls) > 1:
            raise KeyError("gone")
        return images.mean((1, 2, 3))

    trainer = make_trainer(reward_function=failing)
    trainer.model.train()
    state = random.getstate()
    with pytest.raises(RewardError, match="gone"):
        diagnose(trainer, time_limit=20)
    assert random.getstate() == state
    assert trainer.model.training
    assert all(p.grad is None for p in trainer.model.parameters())
