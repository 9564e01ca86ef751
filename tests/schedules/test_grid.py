"""What is read of a scheduler, what is left alone, and what is refused."""

import copy

import diffusers
import pytest
import torch
from scheduler_walk import STABLE_DIFFUSION

from rlr_trainer.schedules import SCHEDULERS
from rlr_trainer.schedules.grid import read_grid

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def make(name: str, **options):
    return getattr(diffusers, name)(**options)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_is_left_as_it_was(name):
    """The pipeline's own may be in the middle of a chain."""
    scheduler = make(name)
    arguments = {"intermediate_timesteps": None} if name == "SCMScheduler" else {}
    scheduler.set_timesteps(7, **arguments)
    before = copy.deepcopy(scheduler)
    grid = read_grid(scheduler, 5)
    assert grid.num_steps == 5 and scheduler.num_inference_steps == before.num_inference_steps
    assert scheduler.config == before.config
    assert torch.equal(scheduler.timesteps, before.timesteps)
    for table in ("alphas_cumprod", "sigmas"):
        assert not hasattr(before, table) or torch.equal(getattr(scheduler, table), getattr(before, table))


def test_mu_changes_the_grid_but_not_the_scheduler():
    scheduler = make("DPMSolverMultistepScheduler", **FLOW, use_dynamic_shifting=True)
    shifted = read_grid(scheduler, 5, mu=1.0)
    assert scheduler.config.flow_shift == 1.0 and not hasattr(scheduler.config, "mu")
    assert shifted.noise[2] > read_grid(scheduler, 5).noise[2]


def test_tables_are_the_scheduler_s_own():
    """Not those that its configuration makes of another class: CogVideoX shifts its SNR; `set_shift` is in no configuration."""
    cogvideox = make("CogVideoXDDIMScheduler", snr_shift_scale=3.0)
    grid = read_grid(cogvideox, 10)
    assert grid.alphas == tuple(float(cogvideox.alphas_cumprod[t]) for t in grid.times)
    plain = read_grid(make("DDIMScheduler", **STABLE_DIFFUSION), 10)
    assert grid.times == plain.times and grid.signal[3] < 0.9 * plain.signal[3]
    flow = make("FlowMatchEulerDiscreteScheduler")
    flow.set_shift(3.0)
    assert read_grid(flow, 4).noise[1] == pytest.approx(3 * 0.667 / (1 + 2 * 0.667))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_initial_latent(spacing):
    """Euler's latents are x / A; their noise has the standard deviation sigma or sqrt(sigma^2 + 1), by the spacing."""
    grid = read_grid(make("EulerDiscreteScheduler", **STABLE_DIFFUSION, timestep_spacing=spacing), 10)
    assert grid.init_std == pytest.approx(1.0 if spacing == "leading" else grid.noise[0])
    assert read_grid(make("DPMSolverMultistepScheduler"), 10).init_std == 1.0


def test_scm_s_noise_has_the_standard_deviation_of_the_data():
    grid = read_grid(make("SCMScheduler", sigma_data=0.25), 2)
    assert grid.init_std == grid.noise_std == 0.25
    assert grid.times == pytest.approx((1.5708, 1.3))
    assert read_grid(make("SCMScheduler"), 2, max_timesteps=1.5, intermediate_timesteps=1.0).times == pytest.approx((1.5, 1.0))


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_a_point_s_coordinates(kind):
    options = {} if kind == "vp" else FLOW
    grid = read_grid(make("UniPCMultistepScheduler", **options), 6)
    assert grid.kind == kind
    for signal, noise, sigma in zip(grid.signal, grid.noise, grid.scheduler.sigmas.tolist(), strict=False):
        if kind == "vp":
            assert signal**2 + noise**2 == pytest.approx(1) and noise / signal == pytest.approx(sigma)
        else:
            assert signal + noise == pytest.approx(1) and noise == sigma
    assert grid.next_noise[:-1] == pytest.approx(grid.noise[1:], abs=1e-12) and grid.next_noise[-1] == 0


def test_clipping_is_read_where_the_step_clips():
    assert read_grid(make("DDPMScheduler", clip_sample_range=0.5), 5).clip_range == 0.5
    assert read_grid(make("CogVideoXDDIMScheduler", clip_sample=True), 5).clip_range is None
    assert read_grid(make("TCDScheduler", clip_sample=True), 5).clip_range is None
    assert read_grid(make("EulerDiscreteScheduler"), 5).clip_range is None


# ---- what is refused ----


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # of diffusers' KDPM2
@pytest.mark.parametrize(
    "name",
    ["HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
     "SASolverScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "IPNDMScheduler", "DDIMInverseScheduler"],
)  # fmt: skip
def test_schedulers_without_a_known_transition(name):
    with pytest.raises(
        ValueError, match=f"scheduler is a {name}, which has no known Gaussian transition; exchange it .*DDIMScheduler, "
    ):
        read_grid(make(name), 10)


def test_a_subclass_may_step_otherwise():
    class Mine(diffusers.DDIMScheduler):
        pass

    with pytest.raises(ValueError, match="scheduler is a Mine, which has no known"):
        read_grid(Mine(), 10)


@pytest.mark.parametrize(
    ("name", "options", "num_steps", "arguments", "message"),
    [
        ("DPMSolverMultistepScheduler", {"thresholding": True}, 5, {}, "thresholding=True.*set it to False"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, 5, {}, "variance_type='learned_range'.*'fixed_small' or"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, 5, {}, "variance_type='fixed_large_log'"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, 5, {}, "variance_type='learned'"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, 5, {}, "invert_sigmas=True"),
        ("FlowMatchLCMScheduler", {"scale_factors": [0.5, 1.0]}, 5, {}, r"scale_factors=\[0.5, 1.0\].*set it to None"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, 5, {}, "prediction_type='flow_prediction' must be one"),
        ("DPMSolverMultistepScheduler", {**FLOW, "prediction_type": "v_prediction"}, 5, {}, "'v_prediction' must be one of .*flow_pred"),
        ("DPMSolverMultistepScheduler", {**FLOW, "use_karras_sigmas": True}, 5, {}, "sigmas reach .*between 0 and 1"),
        ("DPMSolverMultistepScheduler", {**FLOW, "final_sigmas_type": "sigma_min"}, 200, {}, "step 199 .*more noise.*'zero'"),
        ("DDPMScheduler", {}, 0, {}, "sample_num_steps=0: must lie between 1 and"),
        ("DDPMScheduler", {}, 1001, {}, "sample_num_steps=1001: must lie between 1 and the scheduler's 1000"),
        ("DDPMScheduler", {"steps_offset": 1}, 1000, {}, "steps_offset=1 starts at timestep 1000"),
        ("LCMScheduler", {}, 60, {}, "sample_num_steps=60: LCMScheduler.set_timesteps.* failed"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, 5, {}, "`mu` must be passed"),
        ("FlowMatchEulerDiscreteScheduler", {}, 5, {"sigmas": [1.0, 0.5]}, "sample_num_steps=5: .* makes 2 steps"),
        ("FlowMatchEulerDiscreteScheduler", {}, 3, {"sigmas": [1.0, 0.5, 0.0]}, "step 2 .* starts without noise; give sigmas above 0"),
        ("DPMSolverMultistepScheduler", {}, 5, {"mu": 1.0}, r"set_timesteps\(num_inference_steps=5, mu=1.0\) failed: an argument"),
        ("DPMSolverMultistepScheduler", {}, 5, {"sigmas": [1.0]}, "failed: .*sigmas"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 5, {}, "zero terminal SNR"),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 5, {}, "zero terminal SNR"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, 5, {}, "zero terminal SNR"),
    ],
)  # fmt: skip
def test_settings_that_the_chain_does_not_model(name, options, num_steps, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_grid(make(name, **options), num_steps, **arguments)


def test_epsilon_is_fine_where_the_first_timestep_is_not_pure_noise():
    """A leading grid does not reach it, and the cosine table's end is small without being rescaled."""
    read_grid(make("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="leading"), 2)
    read_grid(make("DDIMScheduler", beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"), 5)
