"""Which sampler a scheduler gets, noise levels and windows, and the samplers that diffusers does not have."""

import itertools
import logging
import math

import diffusers
import pytest
import torch
from scheduler_walk import STABLE_DIFFUSION, network, noise

from rlr_trainer.schedules import SAMPLERS, SamplerOptions, Schedule, make_schedule
from rlr_trainer.schedules.grid import read_grid

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SDE = {"algorithm_type": "sde-dpmsolver++"}


def make(name: str, **options):
    return getattr(diffusers, name)(**options)


def flow(**options):
    return make("FlowMatchEulerDiscreteScheduler", shift=3.0, **options)


# ---- auto ----


@pytest.mark.parametrize(
    ("name", "options", "sampler", "stands_in"),
    [
        ("DDIMScheduler", {}, "ddim", False),
        ("DDIMParallelScheduler", {}, "ddim", False),
        ("PNDMScheduler", {}, "ddim", False),
        ("CogVideoXDDIMScheduler", {}, "ddim", False),
        ("DDPMScheduler", {}, "ddpm", False),
        ("DDPMParallelScheduler", {}, "ddpm", False),
        ("EulerAncestralDiscreteScheduler", {}, "euler_ancestral", False),
        ("LCMScheduler", {}, "lcm", False),
        ("TCDScheduler", {}, "tcd", False),
        ("SCMScheduler", {}, "scm", False),
        ("FlowMatchEulerDiscreteScheduler", {}, "flow_cps", False),
        ("FlowMatchLCMScheduler", {}, "flow_cps", False),
        ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 1}, "dpm_sde", False),
        ("DPMSolverMultistepScheduler", SDE, "dpm_sde", True),
        ("DPMSolverSinglestepScheduler", {**SDE, "lower_order_final": True}, "dpm_sde", True),
        ("DPMSolverMultistepScheduler", {**SDE, **FLOW}, "dpm_sde", True),
        ("CogVideoXDPMScheduler", {}, "dpm_sde", True),
        ("EulerDiscreteScheduler", {}, "ddim", True),
        ("LMSDiscreteScheduler", {}, "ddim", True),
        ("DPMSolverMultistepScheduler", {}, "ddim", True),
        ("UniPCMultistepScheduler", {}, "ddim", True),
        ("DEISMultistepScheduler", {}, "ddim", True),
        ("UniPCMultistepScheduler", FLOW, "flow_cps", True),
        ("DPMSolverMultistepScheduler", FLOW, "flow_cps", True),
    ],
)
def test_auto_takes_the_scheduler_s_own_sampler_or_says_what_stands_in(name, options, sampler, stands_in, caplog):
    scheduler = make(name, **options)
    with caplog.at_level(logging.INFO, logger="rlr_trainer"):
        schedule = make_schedule(scheduler, SamplerOptions(6))
    assert [sampler in r.message and name in r.message for r in caplog.records] == [True] * stands_in
    named = SamplerOptions(6, 1.0 if name == "FlowMatchLCMScheduler" else None, sampler)
    assert schedule == make_schedule(scheduler, named) and isinstance(schedule, Schedule)
    # The tables of the samplers that fit differ, so that the equality above says which was taken.
    assert any(schedule.stds)


def test_default_levels():
    for scheduler, sampler, level in (
        (make("DDIMScheduler"), "ddim", 1.0),
        (make("TCDScheduler"), "tcd", 0.3),
        (flow(), "flow_cps", 0.8),
        (flow(stochastic_sampling=True), "auto", 1.0),
        (flow(stochastic_sampling=True), "flow_cps", 0.8),  # named, it is the sampler's own
        (make("FlowMatchLCMScheduler"), "auto", 1.0),
        (flow(), "flow_sde", 0.7),
        (flow(), "dance_sde", 0.3),
    ):
        unset, given = (make_schedule(scheduler, SamplerOptions(6, eta, sampler)) for eta in (None, level))
        other = make_schedule(scheduler, SamplerOptions(6, 0.9 * level, sampler))
        assert unset == given != other


def test_more_level_is_more_noise_and_none_is_the_ode():
    for scheduler, sampler in ((make("DDIMScheduler"), "ddim"), (make("TCDScheduler"), "tcd"), (flow(), "flow_cps")):
        stds = [make_schedule(scheduler, SamplerOptions(6, eta, sampler)).stds for eta in (0.0, 0.4, 0.8, 1.0)]
        assert all(a[0] < b[0] for a, b in itertools.pairwise(stds))
        none, ode = (make_schedule(scheduler, SamplerOptions(6, 0.0, name)) for name in (sampler, "ode"))
        assert none.stds == ode.stds == (0.0,) * 6
        assert none.direction == pytest.approx(ode.direction, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.endswith("_sde") or name == "dpm_sde"])
def test_noise_keeps_the_level(name):
    """d^2 + s^2 = B'^2: from x = A x0 + B x1 and the right prediction comes x' of the next level. Not so for Euler-Maruyama."""
    kinds = SAMPLERS[name].grids
    schedulers = {"vp": make("EulerDiscreteScheduler"), "flow": flow(), "tcd": make("TCDScheduler"), "lcm": make("LCMScheduler"),
                  "scm": make("SCMScheduler")}  # fmt: skip
    for kind in kinds:
        grid, schedule = read_grid(schedulers[kind], 6), make_schedule(schedulers[kind], SamplerOptions(6, sampler=name))
        for kept, std, level in zip(schedule.direction, schedule.stds, grid.next_noise, strict=True):
            assert math.hypot(kept, std / grid.noise_std) == pytest.approx(level, abs=1e-12), kind


# ---- what diffusers lacks, by the papers' formulas ----


@pytest.mark.parametrize("level", [0.25, 0.8])
def test_coefficients_preserving_sampling(level):
    """Of the next level sigma', sin(level pi / 2) is fresh noise and cos(level pi / 2) the predicted one's share."""
    schedule = make_schedule(flow(), SamplerOptions(4, level, "flow_cps"))
    after = [*schedule.noise[1:], 0.0]
    assert schedule.stds == pytest.approx([sigma * math.sin(level * math.pi / 2) for sigma in after])
    assert schedule.direction == pytest.approx([sigma * math.cos(level * math.pi / 2) for sigma in after])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4, 10, 25])
@pytest.mark.parametrize(("sampler", "level"), [("flow_sde", 0.7), ("flow_sde", 1.2), ("dance_sde", 0.3), ("dance_sde", 0.05)])
def test_flow_grpo_and_dance_grpo(sampler, level, num_steps, shift):
    scheduler = make("FlowMatchEulerDiscreteScheduler", shift=shift)
    schedule = make_schedule(scheduler, SamplerOptions(num_steps, level, sampler))
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.double()
    x, v = noise(0, torch.float64), network(noise(1, torch.float64))
    for step in range(num_steps):
        sigma, duration = float(sigmas[step]), float(sigmas[step] - sigmas[step + 1])
        below_one = float(sigmas[1]) if sigma == 1 else sigma
        g = level * (sigma / (1 - below_one)) ** 0.5 if sampler == "flow_sde" else level
        expected = x - v * duration - g**2 / (2 * sigma) * (x + (1 - sigma) * v) * duration
        mean, std = schedule.transition(step, x, v)
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
        assert float(std) == pytest.approx(g * duration**0.5, rel=1e-9)


def test_the_last_step_s_noise():
    """Flow-GRPO's and DanceGRPO's add some, the others none."""
    assert make_schedule(flow(), SamplerOptions(10, sampler="flow_sde")).stds[-1] == pytest.approx(0.0063, abs=5e-5)
    assert make_schedule(flow(), SamplerOptions(10, sampler="dance_sde")).stds[-1] > 0.02
    for name in ("flow_cps", "dpm_sde"):
        assert make_schedule(flow(), SamplerOptions(10, sampler=name)).stds[-1] == 0


def test_flow_grpo_s_noise_where_a_solver_starts_just_below_one():
    """As where the grid starts at 1: the second sigma stands in the denominator, which is 1e-3 or less otherwise."""
    options = SamplerOptions(5, sampler="flow_sde")
    assert make_schedule(flow(), options).stds[0] == pytest.approx(0.7)
    for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        assert make_schedule(make(name, **FLOW), options).stds[0] == pytest.approx(0.7, abs=0.01)


# ---- windows ----


@pytest.mark.parametrize(
    ("window", "noisy"),
    [(1, {0}), (3, {0, 1, 2}), (6, set(range(6))), ((2, 3), {2, 3}), ([0, 0], {0}), ((1, 4), {1, 2, 3, 4})],
    ids=str,
)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "flow_cps", "flow_sde"])
def test_noise_in_a_window_and_the_ode_outside(sampler, window, noisy):
    scheduler = flow() if "flow" in sampler else make("EulerDiscreteScheduler", **STABLE_DIFFUSION, final_sigmas_type="sigma_min")
    part = make_schedule(scheduler, SamplerOptions(6, None, sampler, window))
    whole, ode = (make_schedule(scheduler, SamplerOptions(6, None, name)) for name in (sampler, "ode"))
    for step in range(6):
        source = whole if step in noisy else ode
        assert (part.stds[step], part.direction[step]) == (source.stds[step], source.direction[step])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (make("DDIMScheduler"), {"sampler": "dimm"}, "sampler='dimm': must be one of auto, ddim, ddpm"),
        (
            make("DDIMScheduler"),
            {"sampler": "flow_cps"},
            "'flow_cps' does not fit .* DDIMScheduler; set sampler to one that does: ddim, ddpm, euler_anc",
        ),
        (make("DDIMScheduler"), {"sampler": "tcd"}, "'tcd' does not fit"),
        (make("DDIMScheduler"), {"sampler": "lcm"}, "'lcm' does not fit"),
        (
            flow(),
            {"sampler": "ddim"},
            "'ddim' does not fit .*; set sampler to one that does: dpm_sde, flow_cps, flow_sde, dance_sde, ode$",
        ),
        (make("SCMScheduler"), {"sampler": "ddim"}, "set sampler to one that does: scm, ode$"),
        (make("TCDScheduler"), {"eta": 1.1}, "sample_eta=1.1: must lie between 0 .no noise. and 1 .all noise is fresh"),
        (flow(), {"eta": -0.1}, "sample_eta=-0.1: must lie between 0"),
        (flow(), {"eta": float("nan")}, "sample_eta=nan"),
        (flow(), {"eta": 0.0, "sampler": "flow_sde"}, "sample_eta=0.0: must be above 0 .for none, set sampler='ode'"),
        (flow(), {"eta": float("inf"), "sampler": "dance_sde"}, "sample_eta=inf: must be above 0"),
        (make("DDPMScheduler"), {"eta": 1.0}, "sample_eta=1.0: sampler 'ddpm' has no noise level; leave sample_eta unset"),
        (make("EulerAncestralDiscreteScheduler"), {"eta": 0.0}, "sampler 'euler_ancestral' has no noise level"),
        (flow(), {"eta": 0.5, "sampler": "ode"}, "sampler 'ode' has no noise level"),
        (flow(), {"noise_steps": 0}, "noise_steps=0: a number of steps .* between 1 and 6"),
        (flow(), {"noise_steps": 7}, "noise_steps=7: a number of steps"),
        (flow(), {"noise_steps": True}, "noise_steps=True: must be a number of steps or a pair"),
        (flow(), {"noise_steps": 2.0}, "noise_steps=2.0: must be a number of steps or a pair"),
        (flow(), {"noise_steps": (1, 2, 3)}, r"noise_steps=\(1, 2, 3\): must be a number of steps or a pair"),
        (flow(), {"noise_steps": (0, 2.5)}, "must be a number of steps or a pair"),
        (flow(), {"noise_steps": (3, 2)}, r"noise_steps=\(3, 2\): first and last step must be in order and lie between 0 and 5"),
        (flow(), {"noise_steps": (0, 6)}, r"noise_steps=\(0, 6\): first and last step"),
        (flow(), {"noise_steps": (-1, 2)}, "first and last step"),
        (flow(), {"noise_steps": (5, 5)}, "'flow_cps' adds no noise in these steps"),
        (flow(), {"noise_steps": 2, "sampler": "ode"}, "'ode' adds no noise in these steps"),
    ],
)
def test_options_out_of_range(scheduler, options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(scheduler, SamplerOptions(6, **options))


def test_the_ode_takes_a_level_of_zero():
    assert make_schedule(flow(), SamplerOptions(6, 0.0, "ode")) == make_schedule(flow(), SamplerOptions(6, None, "ode"))


def test_every_sampler_fits_some_scheduler():
    """By name, so that a new one cannot stay without a test here."""
    homes = {"lcm": "LCMScheduler", "tcd": "TCDScheduler", "scm": "SCMScheduler", "flow_cps": "FlowMatchEulerDiscreteScheduler",
             "flow_sde": "FlowMatchEulerDiscreteScheduler", "dance_sde": "FlowMatchEulerDiscreteScheduler"}  # fmt: skip
    for name in SAMPLERS:
        schedule = make_schedule(make(homes.get(name, "DDPMScheduler")), SamplerOptions(6, sampler=name))
        assert any(schedule.stds) == (name != "ode")
