"""Network calls of one update, per sample, for each plan: counted by hooks, on the bundled model.

    python benchmarks/network_calls.py

A call is one row of a forward pass through the denoiser; with guidance every call has two rows, which are not told apart here. Forward passes
are counted apart by whether they keep a graph, backward passes once each. The decoder's calls stand for those of decoder and reward.
Gradient checkpointing runs parts of the network once more inside a backward pass; that is not seen here.
"""

import contextlib
import tempfile
from collections import Counter

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.digits.rewards import ink

STEPS = 10
BATCH = 8
# Name in the table -> options.
PLANS = {
    "`draft`, K = 1": {"estimator": "draft"},
    "`draft`, K = 3": {"estimator": "draft", "fo_steps": 3},
    "`full_bp`": {"estimator": "full_bp"},
    "`ddpo`": {"estimator": "ddpo"},
    "`ddpo`, `num_inner_epochs=2`, per update": {"estimator": "ddpo", "num_inner_epochs": 2},
    "`rlr` (K = 3, LR on 7)": {"estimator": "rlr"},
    "`rlr`, `ho_length=2`": {"estimator": "rlr", "ho_length": 2},
    "`rlr`, `rest_num_steps=2` (LR on 3 of 7)": {"estimator": "rlr", "rest_num_steps": 2},
    "`rlr`, `control_variate=True`": {"estimator": "rlr", "control_variate": True},
    "`rlr_paper` (K = 1, h = 2, ZO on 7)": {"estimator": "rlr_paper"},
    "`sqdf`": {"estimator": "sqdf"},
    "`es`": {"estimator": "es"},
    "`rlr`, `kl_coef=0` (logged only)": {"estimator": "rlr", "kl_coef": 0.0},
    "`rlr`, `kl_coef=0.01`": {"estimator": "rlr", "kl_coef": 0.01},
    "`draft`, K = 1, `kl_coef=0.01`": {"estimator": "draft", "kl_coef": 0.01},
}


def count(options: dict) -> dict[str, float]:
    """Calls per sample and update: forward without and with a graph, backward; decoder forward and backward."""
    calls: Counter = Counter()
    updates = options.get("num_inner_epochs", 1)

    def counting(name):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            rows = len(output)
            calls[f"{name}, graph" if output.requires_grad else name] += rows
            if output.requires_grad:
                output.register_hook(lambda gradient: calls.update({f"{name}, backward": rows}))

        return hook

    with tempfile.TemporaryDirectory() as folder:
        config = RLRConfig(
            output_dir=folder,
            sample_num_steps=STEPS,
            sample_guidance_scale=1.0,
            per_device_train_batch_size=BATCH,
            max_steps=updates,
            save_strategy="no",
            num_log_images=0,
            check_reward=False,
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = RLRTrainer(config, ink, lambda: (digits.PROMPT, {}), digits.load_pipeline())
        trainer.adapter.denoiser.register_forward_hook(counting("network"))
        trainer.adapter.decoder.decoder.register_forward_hook(counting("decoder"))
        with contextlib.redirect_stdout(None):  # Trainer's log lines
            trainer.train()
    return {name: number / BATCH / updates for name, number in calls.items()}


def table() -> str:
    """The table of docs/memory_and_speed.md."""
    lines = [
        "| plan | forward, no graph | forward, graph | backward | decoder and reward, forward | backward |",
        "|---|---|---|---|---|---|",
    ]
    for name, options in PLANS.items():
        calls = count(options)
        numbers = (
            calls.get("network", 0),
            calls.get("network, graph", 0),
            calls.get("network, backward", 0),
            calls.get("decoder", 0) + calls.get("decoder, graph", 0),
            calls.get("decoder, backward", 0),
        )
        lines.append(f"| {name} | " + " | ".join(f"{number:g}" for number in numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
