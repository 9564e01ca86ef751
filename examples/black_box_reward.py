"""A reward that cannot be differentiated, with prompts from a dataset whose columns reach the reward.

A classifier reads which digit was drawn; the reward says only whether the row of the dataset wants that digit. For rows that want none in
particular it is None: those samples are dropped and counted (metric `samples_dropped`).

python examples/black_box_reward.py --max_steps 20
"""

import argparse

import torch
from datasets import Dataset

from rlr_trainer import RLRConfig, RLRTrainer, digits


def prompts() -> Dataset:
    """Prompts that do not name a digit; the column `wanted` names some. The reward gets it as metadata."""
    wanted = [[1, 4, 7], [1, 4, 7], [1, 4, 7], None]
    return Dataset.from_dict({"prompt": [digits.PROMPT] * len(wanted), "wanted": wanted})


class IsWanted:
    """Reward functions may be objects: whatever can be called with (images, prompts, metadata)."""

    def __init__(self) -> None:
        self.judge = digits.load_classifier("judge")

    def __call__(self, images, prompts, metadata):
        with torch.no_grad():
            seen = self.judge(images).argmax(-1).tolist()
        answers = [None if m["wanted"] is None else float(digit in m["wanted"]) for digit, m in zip(seen, metadata, strict=True)]
        return answers, {"digits": seen}  # what is returned beside the rewards reaches the image hook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", default="runs/black_box")
    options = parser.parse_args()
    config = RLRConfig(
        output_dir=options.output_dir,
        overwrite=True,
        estimator="ddpo",  # needs no gradient of the reward
        advantage="leave_one_out",
        sample_num_steps=10,
        sample_guidance_scale=1.0,  # no classifier-free guidance
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        max_steps=options.max_steps,
        lora_r=4,
        save_strategy="no",
        use_cpu=True,  # leave it out to train on a GPU
    )
    trainer = RLRTrainer(config, IsWanted(), None, digits.load_pipeline(), train_dataset=prompts())
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"share of wanted digits: {rewards[0]:.2f} in the first rollout, {rewards[-1]:.2f} in the last")


if __name__ == "__main__":
    main()
