"""How the pipeline's own scheduler can be followed step by step."""

from __future__ import annotations

from typing import Any

from rlr_trainer.schedules import SamplerOptions

DETERMINISTIC = ("DDIMScheduler", "CogVideoXDDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
ADDS_NOISE = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "SCMScheduler", "FlowMatchLCMScheduler")


def comparable_options(pipeline: Any, num_steps: int) -> tuple[SamplerOptions, str]:
    """The options with which our chain is the pipeline's own sampler, and a sentence about them.

    Where the pipeline's scheduler is a solver that looks back at earlier steps, or is not known, the pipeline gets another scheduler on the
    same noise schedule: its own could not be compared.
    """
    name = type(pipeline.scheduler).__name__
    noisy = bool(pipeline.scheduler.config.get("stochastic_sampling"))
    if name in ADDS_NOISE or noisy:
        return SamplerOptions(num_steps), f"with the noise of its {name}"
    if name == "TCDScheduler":  # pipelines hand it eta = 0 unless told otherwise
        return SamplerOptions(num_steps, 0.0), f"with its {name} at eta=0"
    if name in DETERMINISTIC:
        return SamplerOptions(num_steps, sampler="ode"), f"with its {name}, without noise"
    pipeline.scheduler = _same_noise_schedule(pipeline.scheduler)
    return SamplerOptions(
        num_steps, sampler="ode"
    ), f"with {type(pipeline.scheduler).__name__} in place of its {name}, which is not comparable"


def _same_noise_schedule(scheduler: Any) -> Any:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    if type(scheduler).__name__ == "CogVideoXDPMScheduler":  # whose levels are shifted as DDIMScheduler's are not
        from diffusers import CogVideoXDDIMScheduler

        return CogVideoXDDIMScheduler.from_config(config)
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        shift, dynamic = config.get("flow_shift") or 1.0, bool(config.get("use_dynamic_shifting"))
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=shift, use_dynamic_shifting=dynamic)
    return DDIMScheduler.from_config(config)
