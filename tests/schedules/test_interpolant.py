"""Each sampler is its diffusers scheduler: same start, same noise, same latents to the end."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    SCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from scheduler_walk import STABLE_DIFFUSION, largest_difference, network, noise

from rlr_trainer.schedules import SAMPLERS, SamplerOptions, make_schedule

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}
GRIDS = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"final_sigmas_type": "sigma_min"},
]
FLOW_GRIDS = [
    ({}, {}),
    ({"shift": 3.0}, {}),
    ({"shift": 3.0, "use_karras_sigmas": True}, {}),
    ({"use_exponential_sigmas": True}, {}),
    ({"use_beta_sigmas": True}, {}),
    ({"shift_terminal": 0.1}, {}),
    ({"use_dynamic_shifting": True}, {"mu": 0.8}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 1.7}),
    ({"use_dynamic_shifting": True}, {"mu": 0.8, "sigmas": [1.0, 0.8, 0.6, 0.4, 0.2]}),
]


def difference(scheduler, options=None, dtype=torch.float32, num_steps=5, set_timesteps=None, **how):
    """In float64 the scheduler's table is widened as well."""
    if dtype == torch.float64 and hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = make_schedule(scheduler, SamplerOptions(num_steps, **(options or {})), **(set_timesteps or {}))
    return largest_difference(scheduler, schedule, dtype, set_timesteps, **how)


# ---- with noise ----


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm(variance, prediction, spacing, clip):
    scheduler = DDPMScheduler(
        **STABLE_DIFFUSION, variance_type=variance, prediction_type=prediction, timestep_spacing=spacing, clip_sample=clip
    )
    assert difference(scheduler, dtype=torch.float64) <= 1e-9
    assert difference(scheduler, num_steps=50) <= 1e-5


@pytest.mark.parametrize("num_steps", [1, 4, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral(prediction, spacing, num_steps):
    scheduler = EulerAncestralDiscreteScheduler(**STABLE_DIFFUSION, prediction_type=prediction, timestep_spacing=spacing)
    assert difference(scheduler, num_steps=num_steps) <= 1e-5


@pytest.mark.parametrize("grid", [*GRIDS, {"use_lu_lambdas": True}, {"lambda_min_clipped": -3.0}], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_dpm_solver_sde(prediction, grid):
    scheduler = DPMSolverMultistepScheduler(**STABLE_DIFFUSION, **SDE, prediction_type=prediction, **grid)
    assert difference(scheduler, num_steps=8) <= 1e-5


def test_dpm_solver_sde_of_a_flow():
    for shift in (1.0, 3.0):
        assert difference(DPMSolverMultistepScheduler(**SDE, **FLOW, flow_shift=shift), num_steps=8) <= 1e-5


def test_cogvideox_s_dpm_solver():
    """First order: its second order needs the prediction before. Its table is shifted, and its noise level at the start is zero SNR."""
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert difference(scheduler, num_steps=8) <= 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_lcm(prediction):
    """At a small scaling of the timesteps x counts beside the prediction. c_skip and c_out are float32 in the scheduler."""
    for num_steps in (1, 2, 4, 8):
        for options in ({}, {"timestep_scaling": 0.01}, {"clip_sample": True}):
            scheduler = LCMScheduler(prediction_type=prediction, **options)
            assert difference(scheduler, dtype=torch.float64, num_steps=num_steps) <= 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.2, 0.3, 0.7, 1.0])
def test_tcd(eta, prediction):
    for num_steps in (1, 4, 8, 50):
        scheduler = TCDScheduler(prediction_type=prediction)
        assert difference(scheduler, {"eta": eta}, torch.float64, num_steps, {}, eta=eta) <= 1e-9
    assert difference(TCDScheduler(prediction_type=prediction), num_steps=4) <= 1e-5  # eta = 0.3 is the default of both


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_scm(num_steps):
    how = {} if num_steps == 2 else {"intermediate_timesteps": None}
    assert difference(SCMScheduler(), num_steps=num_steps, set_timesteps=how) <= 1e-5


@pytest.mark.parametrize(("grid", "set_timesteps"), FLOW_GRIDS, ids=str)
def test_stochastic_flow_matching(grid, set_timesteps):
    """Flow-CPS at level 1, on any grid."""
    scheduler = FlowMatchEulerDiscreteScheduler(**grid, stochastic_sampling=True)
    assert difference(scheduler, set_timesteps=set_timesteps) <= 1e-5
    assert difference(FlowMatchLCMScheduler(**grid), set_timesteps=set_timesteps) <= 1e-5


# ---- without ----


@pytest.mark.parametrize("grid", [*GRIDS, {"interpolation_type": "log_linear"}], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_euler_s_ode(prediction, grid):
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, prediction_type=prediction, **grid)
    assert difference(scheduler, {"sampler": "ode"}, num_steps=10) <= 1e-5
    assert difference(scheduler, {"eta": 0.0}, num_steps=10) <= 1e-5  # auto takes DDIM


def test_euler_s_other_grids():
    options = {"prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.02, "sigma_max": 80.0}
    for more in ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"rescale_betas_zero_snr": True}):
        assert difference(EulerDiscreteScheduler(**options, **more), {"sampler": "ode"}) <= 1e-5
    zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert difference(EulerDiscreteScheduler(**zero_snr), {"sampler": "ode"}) <= 1e-5


@pytest.mark.parametrize("grid", GRIDS[:-1], ids=str)
def test_solvers_of_first_order(grid):
    """Where their order is 1 they are the ODE's step."""
    of_order_one = {**STABLE_DIFFUSION, "solver_order": 1, **grid}
    for scheduler in (
        DPMSolverMultistepScheduler(**of_order_one),
        UniPCMultistepScheduler(**of_order_one, disable_corrector=list(range(10))),
        DEISMultistepScheduler(**of_order_one),
    ):
        assert difference(scheduler, {"sampler": "ode"}, num_steps=10) <= 1e-5, scheduler
    assert difference(LMSDiscreteScheduler(**STABLE_DIFFUSION, **grid), {"sampler": "ode"}, order=1) <= 1e-5
    if "timestep_spacing" not in grid:
        assert difference(DPMSolverSinglestepScheduler(**of_order_one, lower_order_final=True), {"sampler": "ode"}) <= 1e-5


@pytest.mark.parametrize("grid", [{}, {"flow_shift": 3.0}], ids=str)
def test_solvers_of_flows(grid):
    for scheduler in (
        DPMSolverMultistepScheduler(**FLOW, **grid, solver_order=1),
        DPMSolverSinglestepScheduler(**FLOW, **grid, solver_order=1, lower_order_final=True),
        UniPCMultistepScheduler(**FLOW, **grid, solver_order=1, disable_corrector=list(range(10))),
    ):
        assert difference(scheduler, {"sampler": "ode"}, num_steps=10) <= 1e-5, scheduler
    karras = UniPCMultistepScheduler(**FLOW, **grid, use_karras_sigmas=True, solver_order=1, disable_corrector=list(range(10)))
    karras.set_timesteps(10)
    if float(karras.sigmas.max()) <= 1:  # older diffusers forgets that the sigmas are a flow's
        assert difference(karras, {"sampler": "ode"}, num_steps=10) <= 1e-5
    deis = DEISMultistepScheduler(**FLOW, **grid, solver_order=1)  # divides by 1 - sigma = 0.001, which float32 does not bear
    assert difference(deis, {"sampler": "ode"}, torch.float64, 10) <= 1e-9


@pytest.mark.parametrize(("grid", "set_timesteps"), FLOW_GRIDS, ids=str)
def test_flow_matching_s_ode(grid, set_timesteps):
    for options in ({"sampler": "ode"}, {"eta": 0.0}):  # auto takes Flow-CPS
        scheduler = FlowMatchEulerDiscreteScheduler(**grid)
        assert difference(scheduler, options, set_timesteps=set_timesteps) <= 1e-5


def test_cogvideox_s_ode():
    for options in ({}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}):
        assert difference(CogVideoXDDIMScheduler(**options), {"eta": 0.0}, torch.float64, 10) <= 1e-6


# ---- what the members have in common ----


def test_one_process_by_four_names():
    """DDIM at eta = 1, DDPM, DPM-Solver++ SDE of first order and Euler ancestral."""
    for scheduler in (DDIMScheduler(**STABLE_DIFFUSION), EulerDiscreteScheduler(**STABLE_DIFFUSION, use_karras_sigmas=True)):
        ddim, *others = (
            make_schedule(scheduler, SamplerOptions(10, sampler=name)) for name in ("ddim", "ddpm", "dpm_sde", "euler_ancestral")
        )
        for other in others:
            assert other.stds == pytest.approx(ddim.stds, abs=1e-9)
            assert other.direction == pytest.approx(ddim.direction, abs=1e-9)


def test_half_precision_output_is_widened_first():
    """In float32 the mean is that of the output, not of products rounded to its 8 bits."""
    schedule = make_schedule(DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False), SamplerOptions(10, 1.0))
    x, output = noise(0), network(noise(1)).bfloat16()
    mean, _ = schedule.transition(3, x, output)
    assert torch.equal(mean, schedule.transition(3, x, output.float())[0])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("lcm", "tcd", "scm")])
def test_gradients_flow_through_every_sampler(name):
    """dmean/dx and dmean/doutput are the tables' factors."""
    flow = "flow" in SAMPLERS[name].grids
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else EulerDiscreteScheduler(**STABLE_DIFFUSION)
    schedule = make_schedule(scheduler, SamplerOptions(4, sampler=name))
    x, output = noise(0, torch.float64).requires_grad_(), noise(1, torch.float64).requires_grad_()
    mean, std = schedule.transition(1, x, output)
    mean.sum().backward()
    signal, sigma, after, direction = (
        table[1] for table in (schedule.signal, schedule.noise, schedule.next_signal, schedule.direction)
    )
    of_x, of_output = (
        (after + direction, direction * signal - after * sigma) if flow else (after / signal, direction - after * sigma / signal)
    )
    torch.testing.assert_close(x.grad, torch.full_like(x, of_x))
    torch.testing.assert_close(output.grad, torch.full_like(x, of_output))
    assert not std.requires_grad


# ---- the forward process ----


@pytest.mark.parametrize(
    "scheduler",
    [
        *(
            DDIMScheduler(**STABLE_DIFFUSION, prediction_type=kind, clip_sample=True)
            for kind in ("epsilon", "sample", "v_prediction")
        ),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        SCMScheduler(),
    ],
    ids=lambda scheduler: (
        f"{type(scheduler).__name__}-{scheduler.config.prediction_type if 'prediction_type' in scheduler.config else ''}"
    ),
)
def test_the_target_of_the_network_tells_the_clean_latent(scheduler):
    """Of its forward process x = A x0 + B x1, at every noise level, whatever it predicts; not clipped."""
    schedule = make_schedule(scheduler, SamplerOptions(4, sampler="ode"))
    clean, noise = 3 * torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    scale = scheduler.config.get("sigma_data", 1.0)
    for step in range(4):
        x = schedule.noised(step, clean, noise)
        torch.testing.assert_close(x, schedule.signal[step] * clean + schedule.noise_level(step) * scale * noise)
        target = schedule.target(step, clean, noise)
        torch.testing.assert_close(schedule.denoised(step, x, target), clean)
        torch.testing.assert_close(schedule._told(step, x, target)[1], scale * noise)
        half = schedule.denoised(step, x, target + 1) + schedule.denoised(step, x, target - 1)
        torch.testing.assert_close(half / 2, clean)  # linear
