"""The gradient of an update, without a trainer: against plain autograd, and what must not change it."""

import dataclasses
import math

import pytest
import torch
from tiny_adapter import tiny_run

from rlr_trainer.estimators.advantages import ADVANTAGES
from rlr_trainer.estimators.chain import gaussian_log_density, next_latent
from rlr_trainer.estimators.forward_process import draw_noises
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.zeroth_order import zeroth_order
from rlr_trainer.rollouts.advantage_rule import AdvantageRule
from rlr_trainer.training.updater import check_lora


def plan(preset="rlr", **options):
    return EstimatorPlan.from_preset(preset, 4, **options)


def assert_same(left, right, relative=1e-5):
    assert left.keys() == right.keys()
    largest = max(float(tensor.abs().max()) for tensor in right.values())
    assert largest > 0
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=relative * largest)


def thirds(batch):
    """Micro-batches of one sample and of three, out of order."""
    return [batch.select(torch.tensor(rows)) for rows in ([2], [3, 0, 1])]


def test_full_backpropagation_is_plain_autograd():
    run = tiny_run(plan("full_bp"))
    (batch,), _ = run.collect()
    found, _ = run.gradient([batch])
    chain, x = run.sampler.chain(run.policy, batch.conditioning), batch.rollout.latents[0]
    for step in range(4):
        x = next_latent(*chain.transition(step, x, chain.parameters()), batch.rollout.noises[step])
    params = run.policy.trainable_parameters()
    loss = -run.scorer.decode(x).mean((1, 2, 3)).mean()
    assert_same(found, dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True)))


def test_ddpo_is_the_score_function():
    run = tiny_run(plan("ddpo"), guidance=3.0)
    (batch,), _ = run.collect()
    found, (metrics, _) = run.gradient([batch])
    chain, params = run.sampler.chain(run.policy, batch.conditioning), run.policy.trainable_parameters()
    density = sum(
        gaussian_log_density(batch.rollout.latents[step + 1], *chain.transition(step, batch.rollout.latents[step], params))
        for step in range(4)
    )
    advantage = ADVANTAGES["leave_one_out"](batch.rewards, None, None).values
    grads = torch.autograd.grad(-(advantage * density).mean(), list(params.values()))
    assert_same(found, dict(zip(params, grads, strict=True)))
    assert (metrics["ratio/mean"], metrics["ratio/max_abs_dev"], metrics["clip_ratio"]) == (1, 0, 0)


@pytest.mark.parametrize(
    "options",
    [{}, {"ho_length": 2}, {"control_variate": True}, {"fo_steps": 4}, {"rest_num_steps": 1}, {"rest_estimator": "none"}],
    ids=str,
)
def test_graph_and_recursive_modes_and_micro_batches_give_one_gradient(options):
    run = tiny_run(plan(**options))
    (batch,), _ = run.collect()
    whole, metrics = run.gradient([batch])
    parts, of_parts = run.gradient(thirds(batch))
    assert_same(parts, whole)
    assert metrics[0]["loss"] == pytest.approx((of_parts[0]["loss"] + 3 * of_parts[1]["loss"]) / 4)  # per sample
    graph = tiny_run(plan(**options), recompute="graph")
    assert_same(graph.gradient(graph.collect()[0])[0], whole)


def test_samples_without_a_reward_leave_the_gradient_of_the_others():
    def partial(images, prompts, metadata):
        return torch.where(torch.tensor([True, False, True, False]), images.mean((1, 2, 3)), torch.nan)

    def doubled(images, prompts, metadata):
        return images.mean((1, 2, 3)) * torch.tensor([2.0, 0.0, 2.0, 0.0])

    dropped, even = (tiny_run(plan("full_bp"), reward) for reward in (partial, doubled))
    batches, summary = dropped.collect()
    assert (summary.valid_fraction, summary.metrics["samples_dropped"]) == (0.5, 2)
    found, (metrics, _) = dropped.gradient(batches)
    assert_same(found, even.gradient(even.collect()[0])[0])
    assert metrics["loss"] == pytest.approx(-summary.metrics["reward"])  # a mean over those that have one


def test_normalized_advantages_scale_the_first_order_part_too():
    """FO + LR is then the gradient of E[R] / std."""
    plain, scaled = (tiny_run(plan("full_bp"), advantages=AdvantageRule(name)) for name in ("none", "normalize"))
    batches, summary = scaled.collect()
    expected, _ = plain.gradient(plain.collect()[0])
    assert_same(scaled.gradient(batches)[0], {n: g / (summary.metrics["reward_std"] + 1e-8) for n, g in expected.items()})


def test_ratios_are_clipped_off_policy_alone():
    """On-policy a ratio differs from 1 by rounding, which over little noise may leave the clip range."""
    gradients = {}
    for clip_range in (None, 1e-3):
        run = tiny_run(plan("ddpo"), clip_range=clip_range)
        batches, _ = run.collect()
        with torch.no_grad():
            run.policy.denoiser.shift += 0.01
        for on_policy in (True, False):
            gradients[clip_range, on_policy], (metrics, _) = run.gradient(batches, on_policy=on_policy)
            assert metrics["ratio/max_abs_dev"] > 1e-3
            assert (metrics["clip_ratio"] > 0) == (clip_range is not None and not on_policy)
    assert_same(gradients[1e-3, True], gradients[None, True])
    assert not torch.allclose(gradients[1e-3, False]["denoiser.mix"], gradients[None, False]["denoiser.mix"], rtol=1e-3)


@pytest.mark.parametrize("preset", ["es", "rlr_paper"])
def test_the_loss_scale_enters_every_part_once(preset):
    """As in fp16: with `es` no backward pass is there to carry it."""
    runs = [tiny_run(plan(preset, zo_num_perturbations=2)) for _ in range(2)]
    batches = [run.collect()[0] for run in runs]
    plain, metrics = runs[0].gradient(batches[0], -1.0)
    scaled, same = runs[1].gradient(batches[1], -1024.0)
    assert_same({name: tensor / 1024 for name, tensor in scaled.items()}, plain)
    for part in ("zo", *(["ho"] if preset == "rlr_paper" else [])):
        name = f"estimator/{part}_grad_norm"
        assert same[-1][name] == pytest.approx(metrics[-1][name], rel=1e-4) and metrics[-1][name] > 0
    if preset == "es":
        (batch,) = batches[0]
        terms = zeroth_order(
            batch.zeroth_advantage / 4, batch.draw.zeroth, batch.perturbations, runs[0].policy.trainable_parameters()
        )
        assert_same(plain, {name: -term for name, term in terms.items()})


def test_norms_of_parts_and_steps():
    run = tiny_run(plan(fo_steps=1, ho_length=1, rest_estimator="none"), measure_steps=True)
    batches, _ = run.collect()
    _, (_, metrics) = run.gradient(batches)
    start = int(metrics["estimator/subchain_start"])
    assert metrics["estimator/fo_grad_norm"] == pytest.approx(metrics["estimator/step_grad_norm/3"])
    assert metrics["estimator/ho_grad_norm"] == pytest.approx(metrics[f"estimator/step_grad_norm/{start}"])
    parts_alone = tiny_run(plan(fo_steps=1, ho_length=1, rest_estimator="none"))
    _, (_, fewer) = parts_alone.gradient(parts_alone.collect()[0])
    assert fewer == {name: value for name, value in metrics.items() if "step_grad_norm" not in name}
    silent = tiny_run(plan(fo_steps=1, ho_length=1), measure_parts=False)
    assert not [name for name in silent.gradient(silent.collect()[0])[1][1] if name.endswith("norm")]


def test_starts_learn_from_an_update_and_the_control_variate_from_a_rollout():
    run = tiny_run(plan(ho_start="grad_norm", control_variate=True))
    states = [run.plan_state.state_dict()]
    batches, _ = run.collect()
    states.append(run.plan_state.state_dict())
    run.gradient(batches)
    states.append(run.plan_state.state_dict())
    assert [state["starts"] != states[0]["starts"] for state in states] == [False, False, True]
    assert [state["control_scale"] != states[0]["control_scale"] for state in states] == [False, True, True]


@pytest.mark.parametrize("size", [1e30, math.inf, math.nan])
def test_a_gradient_that_overflows_stops_the_run(size):
    """Its norm is infinite, and clipped by it every entry would be 0: the weights would stay put, and nobody would be told."""
    run = tiny_run(plan("ddpo"))
    (batch,), _ = run.collect()
    for parameter in run.policy.trainable_parameters().values():
        parameter.grad = torch.full_like(parameter, size)
    with pytest.raises(FloatingPointError, match="update 3: the norm of the gradient is (inf|nan), .* bring the reward"):
        run.updater.finish(batch, -1.0, "update 3")
    run.updater.finish(batch, -1024.0, "update 3")  # fp16: the scaler skips it


class _Branches(torch.nn.Module):
    """Two layers with LoRA, of which the output may use either, or none."""

    def __init__(self, used=("first",)):
        super().__init__()
        self.first, self.second, self.used = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), used

    def forward(self, x):
        return sum((getattr(self, name)(x) for name in self.used), start=torch.zeros(()))


@pytest.mark.parametrize(("used", "strict"), [(("first", "second"), True), (("first",), True), ((), True), ((), False)])
def test_lora_weights_that_no_gradient_reaches_are_said(used, strict, caplog):
    from peft import LoraConfig, inject_adapter_in_model

    network = inject_adapter_in_model(LoraConfig(r=1, target_modules=["first", "second"]), _Branches(used))
    if used:
        network(torch.ones(1, 2)).sum().backward()
    weights = {name: p for name, p in network.named_parameters() if ".lora_B." in name}
    if not used and strict:
        with pytest.raises(ValueError, match="no gradient reached any of the 2 LoRA layers .*lora_target_modules"):
            check_lora(weights, strict)
        return
    check_lora(weights, strict)
    dead = 2 - len(used)
    assert (f"{dead} of 2 LoRA layers got no gradient" in caplog.text) == (dead > 0)


# ---- losses on the forward process ----


def matched(run, batch, surrogate):
    """The gradient of `surrogate(step, x_0, noise, output, schedule)` [N], averaged over the levels drawn and the samples; by autograd."""
    chain, schedule = run.sampler.chain(run.policy, batch.conditioning), run.sampler.schedule
    params, clean, total = run.policy.trainable_parameters(), batch.rollout.sample, 0.0
    steps = batch.draw.forward[0].nonzero()[:, 0].tolist()
    for step in steps:
        noise = draw_noises(clean, batch.noise_seeds, step)
        x = schedule.signal[step] * clean + schedule.noise[step] * noise
        total = total + surrogate(step, clean, noise, x, chain.output(step, x, params)).mean() / len(steps)
    return dict(zip(params, torch.autograd.grad(-total, list(params.values())), strict=True))


def test_awm_is_the_matching_loss_weighted_by_the_advantage():
    run = tiny_run(plan("awm"), guidance=3.0)
    (batch,), _ = run.collect()
    found, (metrics, norms) = run.gradient([batch])

    def surrogate(step, clean, noise, x, output):  # the network predicts epsilon
        return -batch.advantage * run.sampler.schedule.noise[step] * 4 * ((output - noise) ** 2).mean((1, 2, 3)) ** 0.25

    assert_same(found, matched(run, batch, surrogate), relative=1e-4)  # but for the loss's floor of 1e-10
    assert (metrics["ratio/mean"], metrics["ratio/max_abs_dev"], metrics["clip_ratio"]) == (1, 0, 0)
    assert norms["estimator/forward_grad_norm"] > 0
    assert len(batch.rollout.latents) == 1


def test_off_policy_awm_is_clipped():
    run = tiny_run(plan("awm"), with_old_policy=True, clip_range=0.05)
    (batch,), _ = run.collect()
    with torch.no_grad():
        run.policy.denoiser.mix.add_(0.1 * torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))
    clipped, (metrics, _) = run.gradient([batch], on_policy=False)
    assert 0 < metrics["clip_ratio"] <= 1
    run.updater.options = dataclasses.replace(run.updater.options, clip_range=None)
    free, _ = run.gradient([batch], on_policy=False)
    assert any(not torch.equal(clipped[name], free[name]) for name in free)


@pytest.mark.parametrize("moved", [False, True])
def test_nft_is_the_loss_of_its_paper(moved):
    run = tiny_run(plan("nft", nft_beta=0.5), with_old_policy=True, advantage_limit=2.0)
    (batch,), _ = run.collect()
    old = {name: p.detach().clone() for name, p in run.policy.trainable_parameters().items()}
    if moved:
        with torch.no_grad():
            run.policy.denoiser.mix.mul_(1.2)
    found, (metrics, _) = run.gradient([batch])
    chain, schedule = run.sampler.chain(run.policy, batch.conditioning), run.sampler.schedule

    def error(predicted, clean):
        distance = (predicted - clean).abs()
        return (distance**2 / distance.detach().mean((1, 2, 3), keepdim=True)).mean((1, 2, 3))

    def surrogate(step, clean, noise, x, output):
        before = chain.output(step, x, old).detach()
        new, past = ((x - schedule.noise[step] * out) / schedule.signal[step] for out in (output, before))
        good = 0.5 + 0.5 * (batch.advantage / 2).clamp(-1, 1)
        return -2 * (good * error(0.5 * past + 0.5 * new, clean) + (1 - good) * error(1.5 * past - 0.5 * new, clean)) / 0.5

    assert_same(found, matched(run, batch, surrogate), relative=1e-4)
    assert "ratio/mean" not in metrics


@pytest.mark.parametrize("name", ["awm", "nft"])
def test_micro_batches_of_a_loss_on_the_forward_process_give_one_gradient(name):
    run = tiny_run(plan(name), with_old_policy=True, num_batches=2)
    batches, _ = run.collect()
    whole, _ = run.gradient(batches)
    together = type(batches[0]).concatenate(batches)  # the batches drew other levels
    mixed, _ = run.gradient([together.select(torch.tensor(rows)) for rows in ([5, 0], [2, 7, 1, 3, 6, 4])])
    assert_same(mixed, whole)
