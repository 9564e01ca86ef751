"""Diffusive Chain-of-Thought: find out which steps of the chain decide what, and aim the estimator at them.

1. Prompts per scale. The coarse (early) steps are prompted for a three, the fine (late) ones for an eight, with the boundary at
   each step in turn. The digit that a judge reads tells which steps decide it.
2. Aim. The plan is a half-order sub-chain of length 1 and nothing else; its start is drawn only among the early steps, or only
   among the late ones. Only the first learns to draw sevens.

python examples/diffusive_chain_of_thought.py --max_steps 40
"""

import argparse

import torch

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.digits.rewards import digit_reward

STEPS = 10


def make_trainer(output_dir: str, **options) -> RLRTrainer:
    defaults = {
        "overwrite": True,
        "sample_num_steps": STEPS,
        "sample_guidance_scale": 1.0,
        "per_device_train_batch_size": 32,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "lora_r": 4,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    config = RLRConfig(output_dir=output_dir, **(defaults | options))
    return RLRTrainer(config, digit_reward(7), lambda: (digits.PROMPT, {}), digits.load_pipeline())


def who_decides(output_dir: str) -> None:
    judge = digits.load_classifier("judge")
    print("coarse prompt: three, fine prompt: eight\nfine from step   judge's P(three)   P(eight)")
    for boundary in range(1, STEPS):
        trainer = make_trainer(output_dir, prompt_scales=[boundary], sample_guidance_scale=3.0)
        images = trainer.generate([(digits.class_prompt(3), digits.class_prompt(8))] * 64, seed=1)
        with torch.no_grad():
            probability = judge(images).softmax(-1).mean(0)
        print(f"{boundary:>14}   {probability[3]:>16.2f}   {probability[8]:>8.2f}")


def aim(output_dir: str, max_steps: int) -> None:
    print(f"\nsub-chain of length 1 aimed at a range of steps, {max_steps} updates\nsteps     judge's P(seven) before   after")
    for first, last in ((0, 3), (6, 9)):
        plan = {"fo_steps": 0, "ho_length": 1, "ho_start": [first, last], "rest_estimator": "none"}
        trainer = make_trainer(output_dir, max_steps=max_steps, **plan)
        judge = digits.load_classifier("judge")
        seen = []
        for train in (False, True):
            if train:
                trainer.train()
            with torch.no_grad():
                seen.append(float(judge(trainer.generate([digits.PROMPT] * 128, seed=2)).softmax(-1)[:, 7].mean()))
        print(f"{first} - {last}     {seen[0]:>23.2f}   {seen[1]:>5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--output_dir", default="runs/dcot")
    options = parser.parse_args()
    who_decides(options.output_dir)
    aim(options.output_dir, options.max_steps)


if __name__ == "__main__":
    main()
