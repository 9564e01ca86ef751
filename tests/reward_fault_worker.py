"""Run by torchrun in tests/rollouts/test_reward_faults.py: trains with rewards that fail in one process, and writes what every process saw.

Usage: reward_fault_worker.py FOLDER
"""

import os
import sys

import torch

from rlr_trainer import RewardError, RLRConfig, RLRTrainer, digits
from rlr_trainer.digits.rewards import ink

FAILING_CALL = {"check": 1, "first batch": 2, "second rollout": 4}


def train(folder, when):
    calls = 0

    def failing(images, prompts, metadata):
        nonlocal calls
        calls += 1
        if int(os.environ["RANK"]) == 1 and calls == FAILING_CALL[when]:
            raise OSError("the disk is full")
        return ink(images, prompts, metadata)

    config = RLRConfig(
        output_dir=os.path.join(folder, when), sample_num_steps=2, sample_guidance_scale=1.0, max_steps=3, lora_r=2, save_strategy="no",
        use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_log_images=0,
    )  # fmt: skip
    trainer = RLRTrainer(config, failing, lambda: (digits.PROMPT, {}), digits.load_pipeline())
    outcome = "finished"
    try:
        trainer.train()
    except RewardError as error:
        outcome = f"{error} | {type(error.__cause__).__name__}"
    # not through an exit code: torchrun would end the other process before it could tell
    with open(os.path.join(folder, f"{when} {os.environ['RANK']}.txt"), "w", encoding="utf-8") as file:
        file.write(f"{trainer.state.global_step} updates, {calls} calls: {outcome}")


def main():
    torch.set_num_threads(1)
    for when in FAILING_CALL:
        train(sys.argv[1], when)


if __name__ == "__main__":
    main()
