"""TRL's trainers and ours on the same weights, prompts, initial latents and noise, in one process.

Ours runs first, on noise of its own; TRL's then samples with its own code, and takes that noise wherever it would draw some.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator

import accelerate
import torch
import transformers
import trl
import trl.models.modeling_sd_base as trl_pipelines
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from rlr_trainer import RLRTrainer, digits

STEPS = 4
LATENT_ENTRIES = 4 * 8 * 8  # D, of the bundled model
WEIGHTS = digits.WEIGHTS / "pipeline"


@dataclasses.dataclass
class Run:
    """What one trainer did. Samples are in the order of their numbers.

    Attributes:
        images: per rollout [N, 3, H, W].
        latents: per rollout, T + 1 tensors [N, ...].
        noises: per rollout, T tensors [N, ...]; ours alone.
        drawn_steps: per rollout [N, T], whether a sample's step is trained; ours alone.
        rewards: per rollout [N].
        advantages: per pass over a rollout [N], limited to adv_clip_max.
        ratios: per pass [N, T]; NaN where a step is not trained.
        losses: per update, what the trainer reports.
        gradients: per update, name -> tensor, as the optimizer gets it (after clipping by norm).
        weights: name -> tensor at the end.
    """

    images: list[Tensor] = dataclasses.field(default_factory=list)
    latents: list[tuple[Tensor, ...]] = dataclasses.field(default_factory=list)
    noises: list[tuple[Tensor, ...]] = dataclasses.field(default_factory=list)
    drawn_steps: list[Tensor] = dataclasses.field(default_factory=list)
    rewards: list[Tensor] = dataclasses.field(default_factory=list)
    advantages: list[Tensor] = dataclasses.field(default_factory=list)
    ratios: list[Tensor] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    gradients: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def prompt_function(count=10):
    """Prompts in turn: the same for whoever asks."""
    asked = iter(range(10**6))
    return lambda: (digits.class_prompt(next(asked) % count), {})


def seven():
    """A reward that both kinds of trainers take: the classifier's score of a seven, which no saturation flattens."""
    classifier = digits.load_classifier("reward")

    def reward(images, prompts, metadata):
        return classifier(images.float())[:, 7], {}

    return reward


def fresh_accelerate_state():
    """Accelerate keeps the first trainer's settings in class variables, and transformers 4 its precision in the environment."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def draw_weights(parameters: dict[str, Tensor]) -> None:
    """The same LoRA weights in both networks; its B starts at 0, and would hide half of the gradient."""
    generator = torch.Generator().manual_seed(5)
    for name in sorted(parameters):
        parameters[name].data.normal_(0, 0.1, generator=generator)


def trl_pipeline():
    """TRL's wrapper of the bundled model."""
    accelerate.PartialState(cpu=True)  # its logger asks for it
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(str(WEIGHTS), use_lora=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _Gradients(transformers.TrainerCallback):
    def __init__(self, run: Run) -> None:
        self.run = run

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.run.gradients.append(
            {name.removeprefix("denoiser."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )


def run_ours(config, pipeline, reward, folder, prompts=10) -> Run:
    """Trains with RLRTrainer on a TRL config, as it stands."""
    fresh_accelerate_state()
    run = Run()
    config.logdir, config.accelerator_kwargs = str(folder / "ours"), {"cpu": True}

    def hook(data, step, tracker):
        run.images.append(data["images"] if isinstance(data, dict) else torch.cat([batch[0] for batch in data]))

    trainer = RLRTrainer(config, reward, prompt_function(prompts), copy.deepcopy(pipeline), hook, callbacks=[_Gradients(run)])
    config = trainer.args
    parameters = {name.removeprefix("denoiser."): p for name, p in trainer.policy.trainable_parameters().items()}
    draw_weights(parameters)
    order, ratios, losses = [], [], []

    queue, updater, step = trainer.parts.queue, trainer.parts.updater, trainer.training_step
    fill, measure = queue.fill, updater._metrics

    def keep_rollout(parts, rows):
        if parts:
            whole = type(parts[0]).concatenate(parts)
            run.latents.append(whole.rollout.latents)
            run.noises.append(whole.rollout.noises)
            run.rewards.append(whole.rewards)
            run.drawn_steps.append(whole.draw.score != 0)
        fill(parts, rows)

    def keep_sweep(batch, result, clip_range):
        values = torch.full((len(batch), config.sample_num_steps), torch.nan)
        for number, log_ratio in result.log_ratios.items():
            values[:, number] = log_ratio.exp()
        order.append(batch.index)
        ratios.append((values, batch.advantage.clone()))
        return measure(batch, result, clip_range)

    def keep_loss(*arguments, **keywords):
        loss = step(*arguments, **keywords)
        losses.append(float(loss))
        return loss

    queue.fill, updater._metrics, trainer.training_step = keep_rollout, keep_sweep, keep_loss
    trainer.train()
    batches = config.gradient_accumulation_steps
    run.losses = [sum(losses[i : i + batches]) for i in range(0, len(losses), batches)]
    batches = config.rollout_size // config.per_device_train_batch_size
    for first in range(0, len(order), batches):
        back = torch.cat(order[first : first + batches]).argsort()
        run.ratios.append(torch.cat([values for values, _ in ratios[first : first + batches]])[back])
        run.advantages.append(torch.cat([advantage for _, advantage in ratios[first : first + batches]])[back])
    run.weights = {name: p.detach().clone() for name, p in parameters.items()}
    return run


@contextlib.contextmanager
def _noise_of(ours: Run, pipeline, batch_size: int, monkeypatch) -> Iterator[None]:
    """TRL's sampler on the noise of our rollouts, in the order in which it asks."""

    def noise():
        for latents, noises in zip(ours.latents, ours.noises, strict=True):
            for first in range(0, len(latents[0]), batch_size):
                yield from (tensor[first : first + batch_size].clone() for tensor in (latents[0], *noises))

    stream = noise()
    with monkeypatch.context() as patch:
        patch.setattr(trl_pipelines, "randn_tensor", lambda shape, **keywords: next(stream))
        patch.setattr(pipeline.sd_pipeline, "prepare_latents", lambda *arguments: next(stream))
        yield
    assert next(stream, None) is None


@contextlib.contextmanager
def _order_of(ours: Run, samples: int, monkeypatch) -> Iterator[None]:
    """Samples keep their order, and of every sample the steps come first that ours trained."""
    drawn = iter([steps for rollout in ours.drawn_steps for steps in rollout])

    def randperm(count, **keywords):
        if count == samples:
            return torch.arange(count)
        return next(drawn, torch.ones(count)).float().argsort(descending=True, stable=True)

    assert samples != STEPS
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randperm", randperm)
        yield


def _trl_trainer(kind, config, pipeline, reward, run: Run, prompts: int):
    fresh_accelerate_state()
    accelerate.PartialState(cpu=True)  # TRL's logger asks for it
    config.accelerator_kwargs = {"cpu": True}
    trainer = kind(config, reward, prompt_function(prompts), pipeline)
    parameters = {name: p for name, p in pipeline.unet.named_parameters() if p.requires_grad}
    draw_weights(parameters)
    clip = trainer.accelerator.clip_grad_norm_

    def keep_gradients(clipped, limit):
        norm = clip(clipped, limit)
        run.gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        return norm

    trainer.accelerator.clip_grad_norm_ = keep_gradients
    return trainer, parameters


def run_trl_ddpo(config, pipeline, reward, ours: Run, monkeypatch, prompts=10) -> Run:
    """Trains with TRL's DDPOTrainer on the noise of `ours`."""
    run = Run()
    trainer, parameters = _trl_trainer(trl.DDPOTrainer, config, pipeline, reward, run, prompts)
    generate, loss, samples = trainer._generate_samples, trainer.loss, []
    calls: list[tuple[Tensor, Tensor, float]] = []

    def keep_rollout(iterations, batch_size):
        samples, pairs = generate(iterations, batch_size)
        latents = torch.cat([torch.cat([s["latents"], s["next_latents"][:, -1:]], 1) for s in samples])
        run.latents.append(latents.unbind(1))
        run.images.append(torch.cat([pair[0] for pair in pairs]))
        return samples, pairs

    def keep_loss(advantages, clip_range, ratio):
        value = loss(advantages, clip_range, ratio)
        calls.append((advantages.clone(), ratio.detach(), float(value.detach())))
        return value

    trainer._generate_samples, trainer.loss = keep_rollout, keep_loss
    samples = config.sample_batch_size * config.sample_num_batches_per_epoch
    with _noise_of(ours, pipeline, config.sample_batch_size, monkeypatch), _order_of(ours, samples, monkeypatch):
        trainer.train()
    steps = trainer.num_train_timesteps
    drawn = [rollout for rollout in ours.drawn_steps for _ in range(config.train_num_inner_epochs)]
    per_pass = samples // config.train_batch_size * steps
    for number, first in enumerate(range(0, len(calls), per_pass)):
        batches = [calls[i : i + steps] for i in range(first, first + per_pass, steps)]
        run.advantages.append(torch.cat([batch[0][0] for batch in batches]))
        ratios = torch.cat([torch.stack([ratio for _, ratio, _ in batch], 1) for batch in batches])
        spread = torch.full((samples, config.sample_num_steps), torch.nan)
        spread[drawn[number]] = ratios.flatten()
        run.ratios.append(spread)
    per_update = config.train_gradient_accumulation_steps * steps
    run.losses = [sum(c[2] for c in calls[i : i + per_update]) / per_update for i in range(0, len(calls), per_update)]
    run.weights = {name: p.detach().clone() for name, p in parameters.items()}
    return run


def run_trl_alignprop(config, pipeline, reward, ours: Run, monkeypatch, prompts=10) -> Run:
    """Trains with TRL's AlignPropTrainer on the noise of `ours`."""
    run = Run()
    trainer, parameters = _trl_trainer(trl.AlignPropTrainer, config, pipeline, reward, run, prompts)
    compute = trainer.compute_rewards

    def keep_rewards(pairs):
        rewards = compute(pairs)
        run.images.append(pairs["images"].detach())
        run.rewards.append(rewards.detach())
        return rewards

    trainer.compute_rewards = keep_rewards
    with _noise_of(ours, pipeline, config.train_batch_size, monkeypatch):
        trainer.train()
    run.weights = {name: p.detach().clone() for name, p in parameters.items()}
    return run
