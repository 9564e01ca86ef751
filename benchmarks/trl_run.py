"""TRL 0.23.1's own trainers on the bundled Stable Diffusion model, with the settings that ours have."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor

from benchmarks.one_run import EVALUATION_SEED, SAMPLES, STEPS, Costs
from benchmarks.tasks import Task
from rlr_trainer import digits


def _allow_no_guidance(pipeline) -> None:
    """TRL joins negative and positive embeddings whatever the guidance, and fails at guidance 1, where latents are not doubled.

    The alternative, a guidance just above 1, would double TRL's network evaluations for nothing.
    """
    encode = pipeline._encode_prompt

    def positive_alone(prompt, device, num_images, guided, *arguments, prompt_embeds=None, **keywords):
        if guided:
            return encode(prompt, device, num_images, guided, *arguments, prompt_embeds=prompt_embeds, **keywords)
        return prompt_embeds

    pipeline._encode_prompt = positive_alone


def run_trl(kind: str, task: Task, learning_rate: float, seed: int, updates: int, batch: int) -> Costs:
    """Trains with TRL's `kind`: DDPOTrainer or AlignPropTrainer; everything not named here is TRL's default."""
    import accelerate
    import trl

    accelerate.PartialState(cpu=True)  # TRL's logger asks for it
    costs = Costs(task)
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(str(digits.WEIGHTS / "pipeline"), use_lora=True)
    _allow_no_guidance(pipeline.sd_pipeline)
    common = {"num_epochs": updates, "seed": seed, "sample_num_steps": STEPS, "sample_guidance_scale": 1.0, "save_freq": 10**9}
    common |= {"train_batch_size": batch, "train_learning_rate": learning_rate, "train_gradient_accumulation_steps": 1}
    common |= {"mixed_precision": "no", "accelerator_kwargs": {"cpu": True}}
    with tempfile.TemporaryDirectory() as folder:
        common["project_kwargs"] = {"project_dir": folder}
        if kind == "DDPOTrainer":
            config = trl.DDPOConfig(
                **common, logdir=folder, sample_batch_size=batch, sample_num_batches_per_epoch=1, train_cfg=False
            )
        else:  # its range of random truncation is in steps, and meant for 50 of them
            config = trl.AlignPropConfig(**common, truncated_rand_backprop_minmax=(0, STEPS))
        trainer = getattr(trl, kind)(config, costs.reward(True), lambda: (digits.PROMPT, {}), pipeline)
        pipeline.set_progress_bar_config(disable=True)

        def generate(samples: int) -> Tensor:
            unet = trainer.sd_pipeline.unet
            training = unet.training
            unet.eval()
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(EVALUATION_SEED)
                ids = pipeline.tokenizer(
                    [digits.PROMPT] * samples,
                    return_tensors="pt",
                    padding="max_length",
                    truncation=True,
                    max_length=pipeline.tokenizer.model_max_length,
                ).input_ids
                embeddings = pipeline.text_encoder(ids)[0]
                output = pipeline(
                    prompt_embeds=embeddings,
                    negative_prompt_embeds=trainer.neg_prompt_embed.repeat(samples, 1, 1),
                    num_inference_steps=STEPS,
                    guidance_scale=1.0,
                    eta=config.sample_eta,
                    output_type="pt",
                )
            unet.train(training)
            return output.images.detach().clamp(0, 1)

        costs.generate = generate
        costs.watch(trainer.sd_pipeline.unet)
        costs.start()
        costs.evaluate(0, SAMPLES)
        step = 0
        for epoch in range(updates):
            step = trainer.step(epoch, step)
            costs.after_update(epoch + 1, updates, batch)
    return costs
