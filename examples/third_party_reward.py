"""A reward from another package: scikit-image counts the holes in what is drawn. It is a black box, so the estimator is DDPO's.

A zero, a six and a nine have one hole, an eight has two, and every loose spot counts against the picture. Any function that scores a
picture becomes a reward in this way: convert the pictures to the package's layout and range, and return its numbers as a list.

pip install scikit-image
python examples/third_party_reward.py --max_steps 60
"""

import argparse

from skimage.measure import euler_number

from rlr_trainer import RLRConfig, RLRTrainer, digits

INK = 0.5


def holes(images, prompts, metadata):
    """Holes minus parts, plus one: 1 minus the Euler number of the ink. [B] numbers from `images` [B, 3, H, W] in [0, 1]."""
    drawn = images.mean(1).cpu().numpy() > INK  # numpy [B, H, W]
    return [1.0 - euler_number(picture, connectivity=2) for picture in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--output_dir", default="runs/holes")
    options = parser.parse_args()
    config = RLRConfig(
        output_dir=options.output_dir,
        overwrite=True,
        estimator="ddpo",  # needs no gradient of the reward
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
    trainer = RLRTrainer(config, holes, lambda: (digits.PROMPT, {}), digits.load_pipeline())
    judge = digits.load_classifier("judge")

    def share_of_eights() -> float:
        return float((judge(trainer.generate([digits.PROMPT] * 128, seed=1)).argmax(-1) == 8).float().mean())

    before = share_of_eights()
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"holes: {rewards[0]:.2f} in the first rollout, {rewards[-1]:.2f} in the last")
    print(f"share of eights: {before:.2f} before, {share_of_eights():.2f} after {options.max_steps} updates")


if __name__ == "__main__":
    main()
