"""Run by torchrun in tests/test_distributed.py: trains two updates, saves the first update's gradients and the final weights of every rank."""

import json
import os
import sys

import torch
from transformers import TrainerCallback

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.demo import digit_reward


class Gradients(TrainerCallback):
    def __init__(self):
        self.updates = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.updates.append(
            {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )


def main():
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    recorder = Gradients()
    config = RLRConfig(
        output_dir=os.path.join(folder, "run"), sample_num_steps=4, sample_guidance_scale=1.0, max_steps=2, lora_r=2, learning_rate=1e-3,
        save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, **options,
    )  # fmt: skip
    pipeline = digits.load_pipeline()
    rows = [{"prompt": digits.class_prompt(d)} for d in range(6)]
    trainer = RLRTrainer(config, digit_reward(7), None, pipeline, train_dataset=rows, callbacks=[recorder])
    for (
        name,
        parameter,
    ) in trainer.policy.trainable_parameters().items():  # LoRA's B starts at 0, and would hide half of the gradient
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    trainer.train()
    weights = {name: p.detach() for name, p in trainer.policy.trainable_parameters().items()}
    rank = trainer.accelerator.process_index
    history = [row for row in trainer.state.log_history if "loss" in row]
    torch.save({"gradients": recorder.updates, "weights": weights, "history": history}, os.path.join(folder, f"rank{rank}.pt"))


if __name__ == "__main__":
    main()
