"""On a DDIM scheduler, the schedule is the Gaussian inside `diffusers.DDIMScheduler.step`, in every configuration that it accepts."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from rlr_trainer.estimators.chain import next_latent
from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.schedules import InterpolantSchedule, SamplerOptions, make_schedule
from rlr_trainer.schedules.grid import read_grid

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
LENGTHS = [1, 2, 5, 10, 50]
SPACINGS = ["leading", "trailing", "linspace"]
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def make(**options) -> DDIMScheduler:
    return DDIMScheduler(**{**STABLE_DIFFUSION, **options})


def ddim(scheduler: DDIMScheduler, num_steps: int, eta: float) -> InterpolantSchedule:
    return make_schedule(scheduler, SamplerOptions(num_steps, eta))


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three of standard normal entries."""
    return tuple(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(s), dtype=dtype) for s in range(3))


def latent_and_output(schedule: InterpolantSchedule, step: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A latent of this noise level, and what a network that is a little off would say of it."""
    clean, noise, error = tensors(torch.float64)
    signal, sigma = schedule.signal[step], schedule.noise[step]
    x, guess = signal * clean + sigma * noise, noise + 0.3 * error
    predicted = (x - sigma * guess) / signal
    outputs = {"epsilon": guess, "sample": predicted, "v_prediction": signal * guess - sigma * predicted}
    return x.to(dtype), outputs[schedule.prediction_type].to(dtype)


def largest_difference(scheduler: DDIMScheduler, num_steps: int, eta: float, dtype: torch.dtype) -> float:
    """Over all steps, relative to the size of the next latent. In float64 the scheduler's tables are widened as well."""
    schedule = ddim(scheduler, num_steps, eta)
    scheduler.set_timesteps(num_steps)
    assert schedule.times == tuple(scheduler.timesteps.tolist()) and schedule.num_steps == num_steps
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.to(dtype)
    noise = tensors(dtype)[2]
    worst = 0.0
    for step, timestep in enumerate(schedule.times):
        x, output = latent_and_output(schedule, step, dtype)
        expected = scheduler.step(output, timestep, x, eta=eta, variance_noise=noise)
        mean, std = schedule.transition(step, x, output)
        assert mean.dtype == std.dtype == dtype and std.shape == ()
        clean, _ = schedule.clean_and_noise(step, x, output)
        for ours, theirs in ((next_latent(mean, std, noise), expected.prev_sample), (clean, expected.pred_original_sample)):
            worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", LENGTHS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_step_is_the_scheduler_s_step(prediction_type, num_steps, spacing):
    """Every eta, end and offset: 1e-6 in float32, and rounding alone in float64 (so that 1e-6 hides no wrong coefficient)."""
    for eta in (0.0, 0.5, 1.0):
        for to_one in (True, False):
            for offset in (0, 1):
                options = {"set_alpha_to_one": to_one, "steps_offset": offset, "timestep_spacing": spacing}
                for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
                    scheduler = make(prediction_type=prediction_type, **options)
                    assert largest_difference(scheduler, num_steps, eta, dtype) <= limit, (eta, options, dtype)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predictions_are_clipped_as_the_scheduler_clips_them(prediction_type):
    for limit in (1.0, 0.3):
        scheduler = make(prediction_type=prediction_type, clip_sample=True, clip_sample_range=limit)
        assert largest_difference(scheduler, 10, 1.0, torch.float32) <= 1e-6
        schedule = ddim(scheduler, 10, 1.0)
        x, output = latent_and_output(schedule, 0, torch.float32)
        assert float(schedule.clean_and_noise(0, x, output)[0].abs().max()) == pytest.approx(limit)
    assert ddim(make(), 10, 1.0).clip_range is None


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.medium
def test_a_long_chain_s_small_strides(eta, to_one):
    """Neighbouring timesteps differ so little that the scheduler's own float32 tables cost digits: 2e-5."""
    scheduler = make(set_alpha_to_one=to_one, steps_offset=1)
    assert largest_difference(scheduler, 999, eta, torch.float32) <= 2e-5
    assert largest_difference(make(set_alpha_to_one=to_one, steps_offset=1), 999, eta, torch.float64) <= 1e-11


def test_a_schedule_rescaled_to_end_in_pure_noise():
    scheduler = make(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert ddim(scheduler, 10, 1.0).signal[0] < 1e-6
    assert largest_difference(scheduler, 10, 1.0, torch.float64) <= 1e-7  # the scheduler keeps alpha of 1e-15 in float32


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_beta_schedules(beta_schedule):
    assert largest_difference(make(beta_schedule=beta_schedule), 10, 1.0, torch.float64) <= 1e-12


# ---- noise ----


def test_without_eta_no_step_adds_noise():
    assert ddim(make(), 10, 0.0).stds == (0.0,) * 10


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(
    ("to_one", "offset", "quiet_end"), [(True, 0, True), (True, 1, True), (False, 0, True), (False, 1, False)], ids=str
)
def test_only_the_last_step_may_be_without_noise(to_one, offset, quiet_end, eta):
    """It ends at alpha = 1, or starts at timestep 0 and goes nowhere. Stable Diffusion's own setting is the last: always some noise."""
    schedule = ddim(make(set_alpha_to_one=to_one, steps_offset=offset), 10, eta)
    assert all(std > 0 for std in schedule.stds[:-1])
    assert (schedule.stds[-1] == 0) == quiet_end
    plan = EstimatorPlan.from_preset("ddpo", 10)
    if quiet_end:
        with pytest.raises(PlanError, match="step 9 of 10 adds no noise"):
            plan.on_noise(schedule.stds)
        EstimatorPlan.from_preset("rlr", 10).on_noise(schedule.stds)
    else:
        plan.on_noise(schedule.stds)


def test_noise_is_proportional_to_eta_and_that_of_ddpm_at_one():
    """At eta = 1 and a stride of 1 the variance is DDPM's posterior variance (fixed_small)."""
    half, full = (ddim(make(set_alpha_to_one=True), 1000, eta).stds for eta in (0.5, 1.0))
    assert all(a == pytest.approx(b / 2) for a, b in zip(half, full, strict=True))
    ddpm = DDPMScheduler(**STABLE_DIFFUSION, variance_type="fixed_small")
    ddpm.alphas, ddpm.betas = ddpm.alphas.double(), ddpm.betas.double()
    ddpm.alphas_cumprod = ddpm.alphas_cumprod.double()
    ddpm.set_timesteps(1000)
    for step in (0, 100, 500, 900):
        assert full[step] ** 2 == pytest.approx(float(ddpm._get_variance(999 - step)), rel=1e-3)


# ---- what it reads and leaves alone ----


def test_the_scheduler_is_left_as_it_was():
    scheduler = make()
    scheduler.set_timesteps(7)
    before = copy.deepcopy(scheduler)
    ddim(scheduler, 20, 1.0)
    assert scheduler.config == before.config and scheduler.num_inference_steps == 7
    assert torch.equal(scheduler.timesteps, before.timesteps)
    assert torch.equal(scheduler.alphas_cumprod, before.alphas_cumprod)


def test_pndm_is_read_by_its_configuration():
    """Its own grid repeats timesteps. As a pipeline's scheduler is exchanged with `DDIMScheduler.from_config`."""
    options = {name: value for name, value in STABLE_DIFFUSION.items() if name != "clip_sample"}
    pndm = PNDMScheduler(**options, steps_offset=1, skip_prk_steps=True)
    assert ddim(pndm, 10, 1.0) == ddim(DDIMScheduler.from_config(pndm.config, clip_sample=False), 10, 1.0)


@pytest.mark.parametrize(("options", "limit"), [({}, None), ({"clip_sample": False}, None), ({"clip_sample": True}, 1.0)], ids=str)
def test_pndm_does_not_clip_unless_its_configuration_says_so(options, limit):
    """PNDM never clips and its configuration may not say anything; DDIM's default would clip latents at 1."""
    pndm = PNDMScheduler.from_config({**PNDMScheduler(skip_prk_steps=True).config, **options})
    assert read_grid(pndm, 10).clip_range == limit


def test_a_gradient_flows_through_mean_and_prediction():
    schedule = ddim(make(), 10, 1.0)
    x, output, _ = (t.requires_grad_() for t in tensors(torch.float64))
    mean, std = schedule.transition(4, x, output)
    mean.sum().backward()
    ratio = schedule.next_signal[4] / schedule.signal[4]
    torch.testing.assert_close(x.grad, torch.full_like(x, ratio))
    torch.testing.assert_close(output.grad, torch.full_like(x, schedule.direction[4] - ratio * schedule.noise[4]))
    assert not std.requires_grad


@pytest.mark.parametrize(
    ("options", "num_steps", "eta", "message"),
    [
        ({}, 0, 1.0, "sample_num_steps=0: must lie between 1 and the scheduler's 1000 training timesteps"),
        ({}, 1001, 1.0, "sample_num_steps=1001: must lie between 1 and"),
        ({}, 10, -0.1, "sample_eta=-0.1: must lie between 0 .* and 1"),
        ({}, 10, 1.5, "sample_eta=1.5: must lie between 0"),
        ({}, 10, float("nan"), "sample_eta=nan"),
        ({"thresholding": True}, 10, 1.0, "thresholding=True.*set it to False"),
        ({"prediction_type": "flow"}, 10, 1.0, "prediction_type='flow' must be one of"),
        (
            {"steps_offset": 1},
            1000,
            1.0,
            "steps_offset=1 starts at timestep 1000, beyond the last one, 999; use 999 steps or steps_offset=0",
        ),
    ],
)
def test_what_is_no_gaussian_step_is_refused(options, num_steps, eta, message):
    with pytest.raises(ValueError, match=message):
        ddim(make(**options), num_steps, eta)
