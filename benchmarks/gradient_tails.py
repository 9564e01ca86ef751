"""How large single updates of `full_bp`, `rlr` and `ddpo` are, over many batches: typical ones and the rare large ones.

    python benchmarks/gradient_tails.py [--batches 300] [--seed 42]

On the bundled model at the settings of the demo (10 steps, no guidance, LoRA weights of rank 4 before training), batches of 16. The three
updates of a batch share prompts and noise.
"""

import argparse
import tempfile

import torch

from rlr_trainer import EstimatorPlan, RLRConfig, RLRTrainer, digits
from rlr_trainer.diagnosis.comparison import compose
from rlr_trainer.diagnosis.step_profile import start_profile
from rlr_trainer.diagnosis.workbench import untouched
from rlr_trainer.digits.rewards import digit_reward

STEPS = 10
PLANS = {"full_bp": {}, "rlr": {"fo_steps": 3}, "ddpo": {}}
SHARES = (0.5, 0.9, 0.99, 1.0)


def norms(batches: int, seed: int) -> dict[str, torch.Tensor]:
    """Norms of the updates, [batches] per plan."""
    plans = {name: EstimatorPlan.from_preset(name, STEPS, **options) for name, options in PLANS.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in plans}
    with tempfile.TemporaryDirectory() as folder:
        config = RLRConfig(
            output_dir=folder, sample_num_steps=STEPS, sample_guidance_scale=1.0, per_device_train_batch_size=16, lora_r=4, seed=seed,
            use_cpu=True, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        trainer = RLRTrainer(config, digit_reward(7), lambda: (digits.PROMPT, {}), digits.load_pipeline())
        with untouched(trainer) as bench:
            builder, _, _ = start_profile(bench)
            for number in range(batches):
                first_order, ratio = builder.add(bench.collect(number, builder.reference))
                for name, plan in plans.items():
                    found[name].append(compose(plan, first_order, ratio).norm())
    return {name: torch.stack(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    print("norm of one update, in reward units per unit of weight")
    print("| plan | median | 90 % below | 99 % below | largest | root mean square | largest batch's share of the mean square |")
    print("|---|---|---|---|---|---|---|")
    for name, values in norms(args.batches, args.seed).items():
        quantiles = [f"{value:.2g}" for value in torch.quantile(values, torch.tensor(SHARES, dtype=values.dtype)).tolist()]
        squares = values.square()
        share = float(squares.max() / squares.sum())
        print(f"| `{name}` | {' | '.join(quantiles)} | {float(squares.mean().sqrt()):.2g} | {share:.0%} |")


if __name__ == "__main__":
    main()
