"""A reward of your own on the bundled model: pictures whose ink lies to the left. It is differentiable, so RLR's default plan applies.

python examples/custom_reward.py --max_steps 20
"""

import argparse

from rlr_trainer import RLRConfig, RLRTrainer, digits


def left_heavy(images, prompts, metadata):
    """Share of the ink in the left half, [B] in [0, 1]. `images` are float [B, 3, H, W] in [0, 1]."""
    ink = images.mean(1)
    left = ink[:, :, : ink.shape[2] // 2].sum((1, 2))
    return left / ink.sum((1, 2)).clamp_min(1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", default="runs/left_heavy")
    options = parser.parse_args()
    config = RLRConfig(
        output_dir=options.output_dir,
        overwrite=True,
        sample_num_steps=10,
        sample_guidance_scale=1.0,  # no classifier-free guidance
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        max_steps=options.max_steps,
        lora_r=4,
        save_strategy="no",
        use_cpu=True,  # leave it out to train on a GPU
    )
    trainer = RLRTrainer(config, left_heavy, lambda: (digits.PROMPT, {}), digits.load_pipeline())
    before = left_heavy(trainer.generate([digits.PROMPT] * 64, seed=1), None, None)
    trainer.train()
    after = left_heavy(trainer.generate([digits.PROMPT] * 64, seed=1), None, None)
    trainer.save_pretrained(options.output_dir)
    print(f"share of ink on the left: {before.mean():.3f} before, {after.mean():.3f} after {options.max_steps} updates")


if __name__ == "__main__":
    main()
