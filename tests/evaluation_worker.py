"""Run by torchrun in tests/test_evaluation.py: trains two updates with an evaluation, and saves the log of every rank."""

import json
import os
import sys

import torch

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.digits.rewards import digit_reward


def main():
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    config = RLRConfig(
        output_dir=os.path.join(folder, "run"), sample_num_steps=4, sample_guidance_scale=1.0, max_steps=2, lora_r=2, learning_rate=1e-3,
        save_strategy="no", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    rows = [{"prompt": digits.class_prompt(d)} for d in range(6)]
    trainer = RLRTrainer(config, digit_reward(7), None, digits.load_pipeline(), train_dataset=rows, eval_dataset=rows[:3])
    trainer.train()
    with open(os.path.join(folder, f"rank{trainer.accelerator.process_index}.json"), "w") as file:
        json.dump(trainer.state.log_history, file)


if __name__ == "__main__":
    main()
