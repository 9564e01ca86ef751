"""`recompute="keep"`: the gradient of "recursive" without a second forward pass, its memory, its refusals, and what "auto" chooses."""

import copy
import dataclasses
import logging
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_adapter import tiny_run
from torch.utils._python_dispatch import TorchDispatchMode

from rlr_trainer import RLRConfig
from rlr_trainer.estimators.chain import sample_chain
from rlr_trainer.estimators.kept_steps import KeptSteps
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.sweep import Feedback, Sweep
from rlr_trainer.rollouts.graph_keeping import GraphKeeping, _cgroup_left, free_bytes, graph_bytes
from rlr_trainer.rollouts.prompts import PromptRow
from rlr_trainer.training.keeping import graph_keeping, launch_obstacle

STEPS = 5


def plan(preset, steps=STEPS, **options):
    return EstimatorPlan.from_preset(preset, steps, **options)


CASES = {
    "ddpo": ("ddpo", {}, {}),
    "rlr": ("rlr", {}, {}),
    "rlr-long-subchain": ("rlr", {"ho_length": 2, "fo_steps": 1}, {}),
    "rlr-subset": ("rlr", {"rest_num_steps": 1, "ho_length": 0}, {}),
    "draft": ("draft", {}, {}),
    "full_bp": ("full_bp", {}, {}),
    "control-variate": ("rlr", {"control_variate": True, "fo_steps": 1}, {}),
    "sqdf": ("sqdf", {}, {}),
    "penalty": ("rlr", {}, {"with_reference": True, "kl_coef": 0.1}),
    "penalty-on-skipped-steps": ("draft", {}, {"with_reference": True, "kl_coef": 0.1}),
    "guidance": ("rlr", {}, {"guidance": 3.0}),
    "two-batches": ("rlr", {}, {"num_batches": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_recursion_bit_for_bit(case):
    preset, options, how = CASES[case]
    found = {}
    for keep in (False, True):
        run = tiny_run(plan(preset, **options), keeping=GraphKeeping(keep), **how)
        forward = []
        run.policy.denoiser.register_forward_hook(
            lambda module, inputs, output, calls=forward: calls.append(output[0].requires_grad)
        )
        batches, _ = run.collect()
        sampled = len(forward)
        found[keep] = (*run.gradient(batches), forward, sampled)
        if keep:
            assert all(len(batch.kept) == 0 for batch in batches)
            tensors = [t for b in batches for t in (*b.rollout.latents, *b.rollout.means, *b.rollout.stds, *b.rollout.noises)]
            assert not any(t.requires_grad for t in tensors)
    (gradient, metrics, calls, _), (kept, kept_metrics, kept_calls, kept_sampled) = found[False], found[True]
    assert max(float(g.abs().max()) for g in gradient.values()) > 0
    assert all(torch.equal(gradient[name], kept[name]) for name in gradient)
    assert metrics == kept_metrics
    visited = len(batches) * len(batches[0].draw.visited_steps([True] * STEPS if how.get("kl_coef") else []))
    assert len(calls) - len(kept_calls) == visited
    assert kept_sampled <= len(kept_calls)


def test_a_step_is_freed_by_its_own_backward_pass():
    run = tiny_run(plan("rlr", fo_steps=2), keeping=GraphKeeping(True))
    (batch,), _ = run.collect()
    refs = {step: weakref.ref(kept.mean) for step, kept in batch.kept._steps.items()}
    alive = []

    def backward(surrogate, ends_update):
        surrogate.backward()
        alive.append(sorted(step for step, ref in refs.items() if ref() is not None))
        return 1.0

    run.updater.accumulate(run.policy, batch, backward)
    # the step itself is still a local variable of the sweep while it is differentiated
    assert alive == [list(range(step + 1)) for step in reversed(range(STEPS))]
    assert all(ref() is None for ref in refs.values())


def test_parts_of_a_batch_and_second_uses_are_refused():
    run = tiny_run(plan("ddpo"), keeping=GraphKeeping(True))
    (batch,), _ = run.collect()
    with pytest.raises(ValueError, match="differentiated whole"):
        batch.select(torch.tensor([0]))
    with pytest.raises(ValueError, match="differentiated whole"):
        type(batch).concatenate([batch, batch])
    sweep = Sweep(SimpleNamespace(), {}, lambda surrogate: 1.0, recompute="graph")
    with pytest.raises(ValueError, match="recompute='graph' with kept steps"):
        sweep.run(batch.rollout, batch.draw, Feedback(batch.advantage), batch.kept)
    run.gradient([batch])
    with pytest.raises(ValueError, match="step 4: its graph was not kept, or is used up"):
        run.gradient([batch])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_inner_epochs": 2}, "2 updates per rollout"),
        ({"sample_num_batches_per_epoch": 2}, "2 updates per rollout"),
        ({"sample_batch_size": 8, "gradient_accumulation_steps": 2}, "sample_batch_size=8 and per_device_train_batch_size=4"),
        ({"offload_rollouts": True}, "offload_rollouts=True"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True"),
        ({"estimator": "rlr_paper"}, "a zeroth-order plan"),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_it(options, reason, caplog):
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "sample_num_steps": 4,
        "estimator": "ddpo",
        "zo_num_perturbations": 2,
    }
    with pytest.raises(ValueError, match=f"recompute='keep' with {reason}.*or set recompute='recursive'"):
        RLRConfig(recompute="keep", **(defaults | options))
    keeping = graph_keeping_of(RLRConfig(recompute="auto", **(defaults | options)), caplog)
    assert keeping.keep is False
    assert reason in caplog.text


def graph_keeping_of(config, caplog, processes=1, **plugins):
    accelerator = SimpleNamespace(state=SimpleNamespace(**plugins), num_processes=processes)
    with caplog.at_level(logging.WARNING):
        return graph_keeping(config, config.plan, accelerator, list)


def test_launches_that_do_not_go_with_it(caplog):
    config = RLRConfig(use_cpu=True, recompute="keep", sample_num_steps=4)
    assert graph_keeping_of(config, caplog).keep is True
    with pytest.raises(ValueError, match="recompute='keep' with 2 processes"):
        graph_keeping_of(config, caplog, processes=2)
    for name, kind in (("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")):
        accelerator = SimpleNamespace(state=SimpleNamespace(**{f"{name}_plugin": object()}), num_processes=1)
        assert launch_obstacle(accelerator).startswith(kind)


def test_auto_decides_by_the_memory_that_is_free(caplog):
    run = tiny_run(plan("ddpo"), num_batches=2)
    chain = run.sampler.chain(run.policy, run.sampler.condition([PromptRow("a", {})] * 4))
    x = chain.initial(4, torch.Generator().manual_seed(0))
    weights = list(run.policy.parameters())
    per_step = graph_bytes(lambda: chain.transition(0, x.clone().requires_grad_(), chain.parameters()), [x, *weights])
    assert per_step >= 2 * x.untyped_storage().nbytes()  # tanh keeps its output, the mixing its input
    enough = 2 * per_step * STEPS * 2  # twice what 5 steps of 2 batches take
    for free, chosen in ((enough, True), (enough - 1, False)):
        caplog.clear()
        keeping = GraphKeeping(None, 2, lambda: weights, lambda device, free=free: free)
        own = tiny_run(plan("ddpo"), num_batches=2, keeping=keeping)
        keeping.weights = lambda own=own: list(own.policy.parameters())
        with caplog.at_level(logging.WARNING):
            batches, _ = own.collect()
        assert keeping.keep is chosen
        assert [batch.kept is not None for batch in batches] == [chosen] * 2
        assert f"recompute='auto': chose {'keep' if chosen else 'recursive'}" in caplog.text
        keeping.free = lambda device: pytest.fail("decided once")
        own.collect(1)


def test_free_memory_is_that_of_the_machine_within_the_limit_of_its_cgroup(tmp_path):
    assert free_bytes(torch.device("cpu")) > 0
    assert _cgroup_left(tmp_path) == sys.maxsize
    (tmp_path / "memory.current").write_text("300\n")
    for limit, left in (("1000\n", 700), ("max\n", sys.maxsize)):
        (tmp_path / "memory.max").write_text(limit)
        assert _cgroup_left(tmp_path) == left


@pytest.mark.medium
def test_a_training_ends_at_the_same_weights(make_trainer, pipeline, tmp_path):
    ends, logs = [], []
    for number, recompute in enumerate(("recursive", "keep")):
        folder = str(tmp_path / str(number))
        trainer = make_trainer(
            sd_pipeline=copy.deepcopy(pipeline), output_dir=folder, recompute=recompute, num_log_images=0, max_steps=1
        )
        trainer.train()
        ends.append([p.detach().clone() for p in trainer.policy.trainable_parameters().values()])
        logs.append(
            [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in trainer.state.log_history[:-1]]
        )
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    assert logs[0] == logs[1]


class HostReads(TorchDispatchMode):
    """Counts the operations with which the host asks a tensor for its value."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.is_nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("preset", "how"), [("ddpo", {}), ("full_bp", {}), ("rlr", {"with_reference": True, "kl_coef": 0.1})], ids=str
)
def test_the_host_asks_as_often_for_a_long_chain_as_for_a_short_one(preset, how, keep):
    """On a device every question waits for all that was asked of it before."""
    counts = []
    for steps in (4, 8):
        run = tiny_run(plan(preset, steps, fo_steps=2 if preset == "rlr" else None), keeping=GraphKeeping(keep), **how)
        (batch,), _ = run.collect()
        chain = run.sampler.chain(run.policy, batch.conditioning)
        with HostReads() as reads:
            run.sampler.sample(run.policy, [PromptRow("a", {})], None)
            run.gradient([batch])
        counts.append(reads.count)
        assert chain.num_steps == steps
    assert counts[0] == counts[1]


def test_errors_found_at_the_end_name_their_step():
    run = tiny_run(plan("full_bp"))
    (batch,), _ = run.collect()
    with pytest.raises(FloatingPointError, match=r"step 3: the adjoint, shape \(4, 3, 2, 2\)"):
        run.gradient([dataclasses.replace(batch, rollout=broken_at(batch.rollout, 3))])
    chain = run.sampler.chain(run.policy, batch.conditioning)
    asked = []

    def step(number, x):
        asked.append(number)
        mean, std = chain.transition(number, x, chain.parameters())
        return (mean, std) if number < 2 else (mean, std / 0)

    with pytest.raises(FloatingPointError, match="step 2 of 5: the std of the next latent"):
        sample_chain(chain, 4, torch.Generator().manual_seed(0), step_function=step)
    assert asked == list(range(STEPS))


def broken_at(rollout, step):
    """A rollout whose input of one step, and so the network's derivative there, is not a number."""
    latents = [latent.clone() for latent in rollout.latents]
    latents[step][0, 0, 0, 0] = torch.nan
    return dataclasses.replace(rollout, latents=tuple(latents))


def test_what_is_kept_is_what_the_sweep_visits():
    draw = plan("draft").draw(4, torch.Generator().manual_seed(0), shared=True)
    assert KeptSteps.of_draw(draw).carries == {4: False}
    assert KeptSteps.of_draw(draw, (1.0, 1.0, 0.0, 1.0, 1.0)).carries == {0: False, 1: False, 3: False, 4: False}
    assert plan("full_bp").draw(1, None, shared=True).visited_steps() == list(range(STEPS))
