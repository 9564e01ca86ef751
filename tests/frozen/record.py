"""Short runs at fixed seeds, one for everything that changes what an update computes, and what each leaves: metrics and weights.

`python tests/frozen/record.py OUTPUT.json [NAME ...]` does the runs and writes their curves; under torchrun those of `DISTRIBUTED`.
Only public names are used, so that the file outlives every refactoring.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

# The plain kernels of the libraries: the curves then do not depend on which vector units the machine has.
PLAIN_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}
TIMES = ("seconds", "time/", "runtime", "total_flos", "samples_per_second", "steps_per_second")
PROMPTS = [{"prompt": f"a handwritten digit {word}", "bias": i / 10} for i, word in enumerate(("zero", "one", "two", "three"))]

SMALL = {
    "sample_num_steps": 4,
    "sample_guidance_scale": 1.0,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "lora_r": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "num_log_images": 0,
}
OFF_POLICY = {"estimator": "ddpo", "sample_num_batches_per_epoch": 2, "num_inner_epochs": 2, "max_steps": 4, "clip_range": 0.05}
# name -> options on top of SMALL; `seven`, `ink`, `both`: the rewards; `dataset`: prompts from rows; `resumed`: stopped and taken up again
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"estimator": name} for name in ("rlr", "ddpo", "draft", "alignprop", "full_bp", "sqdf")},
    **{name: {"estimator": name, "zo_num_perturbations": 2} for name in ("rlr_paper", "es")},
    "rlr-whole-network": {"use_lora": False, "learning_rate": 1e-4},
    "ddpo-whole-network": {"estimator": "ddpo", "use_lora": False, "learning_rate": 1e-4},
    "rlr-guidance": {"sample_guidance_scale": 3.0, "negative_prompt": "a cat"},
    "rlr_paper-guidance": {"estimator": "rlr_paper", "zo_num_perturbations": 2, "sample_guidance_scale": 3.0},
    "rlr-groups": {"num_images_per_prompt": 2, "dataset": True},
    "ddpo-groups": {"estimator": "ddpo", "num_images_per_prompt": 2, "dataset": True},
    "ddpo-per-prompt": {"estimator": "ddpo", "advantage": "per_prompt", "per_prompt_min_count": 2, "dataset": True},
    "ddpo-inner-epochs": OFF_POLICY,
    "rlr-inner-epochs": {"sample_num_batches_per_epoch": 2, "num_inner_epochs": 2, "max_steps": 4, "fo_steps": 1},
    "rlr-accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "rlr_paper-accumulation": {"estimator": "rlr_paper", "gradient_accumulation_steps": 2, "zo_num_perturbations": 2},
    "rlr-sampled-at-once": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "sample_batch_size": 4},
    "rlr-kl": {"kl_coef": 0.1, "fo_steps": 1},
    "rlr-kl-whole-network": {"kl_coef": 0.1, "use_lora": False, "learning_rate": 1e-4},
    "ddpo-kl-inner-epochs": OFF_POLICY | {"kl_coef": 0.1},
    "rlr-average": {"ema_decay": 0.5},
    "rlr-control-variate": {"control_variate": True, "fo_steps": 1},
    "rlr-grad-norm-starts": {"fo_steps": 1, "ho_length": 2, "ho_start": "grad_norm", "max_steps": 4},
    "rlr-subset": {"fo_steps": 1, "rest_num_steps": 1},
    "rlr-graph": {"recompute": "graph", "fo_steps": 2, "ho_length": 2, "rest_estimator": "none"},
    "rlr-weights": {"fo_steps": 1, "ho_length": 1, "fo_weight": 0.5, "ho_weight": 2.0, "rest_weight": 0.7},
    "rlr-scales": {"prompt_scales": [2], "scales": True},
    "rlr-two-rewards": {"rewards": "both", "reward_weights": [1.0, 0.5]},
    "rlr-each-normalized": {"rewards": "both", "reward_aggregation": "normalize_then_sum", "fo_steps": 1},
    "ddpo-async": {"estimator": "ddpo", "async_rewards": True, "rewards": "both", "sample_num_batches_per_epoch": 1},
    "rlr-reward-batches": {"reward_batch_size": 3, "fo_steps": 2},
    "rlr-evaluation": {"dataset": True, "evaluate": True, "eval_strategy": "steps", "eval_steps": 2, "num_log_images": 3, "log_images_steps": 9},
    "rlr-resumed": {"max_steps": 4, "resumed": 2},
    "ddpo-resumed": OFF_POLICY | {"max_steps": 8, "resumed": 4},
    "rlr-resumed-all": {
        "max_steps": 4, "resumed": 2, "control_variate": True, "fo_steps": 1, "ho_length": 2, "ho_start": "grad_norm", "kl_coef": 0.1,
        "ema_decay": 0.5, "dataset": True, "num_images_per_prompt": 2,
    },
}  # fmt: skip
DISTRIBUTED = {name: RUNS[name] for name in ("rlr", "rlr_paper", "ddpo-inner-epochs", "rlr-kl", "rlr-control-variate")}


def machine() -> dict[str, str]:
    """What the curves may depend on, in their last bits."""
    import diffusers
    import torch
    import transformers

    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.processor())
    versions = {library.__name__: str(library.__version__) for library in (torch, transformers, diffusers)}
    return versions | {"processor": model.split(":")[-1].strip()}


def curve(name: str, options: dict[str, Any], folder: Path, pipeline: Any) -> dict[str, Any]:
    """The metrics of every log line but times, and digests of the trained and the saved weights."""
    options = dict(SMALL | options)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options["per_device_train_batch_size"] //= processes
    resumed = options.pop("resumed", None)
    trainer = _trainer(
        options | ({"max_steps": resumed, "save_strategy": "steps", "save_steps": 2} if resumed else {}), folder, pipeline
    )
    trainer.train()
    if resumed:
        pipeline = copy.deepcopy(_PIPELINE[0])
        trainer = _trainer(options | {"save_strategy": "steps", "save_steps": 2}, folder, pipeline)
        trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / "saved"))
    rows = [
        {key: value for key, value in row.items() if not any(word in key for word in TIMES)}
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]
    return {
        "metrics": [row for row in rows if "loss" in row or any(key.startswith("eval_") for key in row)],
        "weights": _digest({n: p.detach() for n, p in trainer.policy.named_parameters() if p.requires_grad}),
        "saved": _digest(_saved(folder / "saved")),
        "pictures": [json.loads(path.read_text())["rewards"] for path in sorted((folder / "samples").glob("step_*.json"))],
    }


_PIPELINE: list[Any] = []


def _trainer(options: dict[str, Any], folder: Path, pipeline: Any) -> Any:
    import torch

    from rlr_trainer import RLRConfig, RLRTrainer, digits

    seven_classifier = digits.load_classifier("reward")

    def seven(images, prompts, metadata):
        # the logit: a probability of pictures after four steps is nothing but rounding
        return seven_classifier(images)[:, 7] / 10 + torch.tensor([float(m.get("bias", 0.0)) for m in metadata])

    def ink(images, prompts, metadata):
        return images.mean((1, 2, 3))

    options = dict(options)
    rewards = {"seven": seven, "both": [seven, ink]}[options.pop("rewards", "seven")]
    source: dict[str, Any] = {"prompt_function": lambda: ("a handwritten digit", {})}
    if options.pop("scales", False):
        source = {"prompt_function": lambda: (["a handwritten digit", "a handwritten digit seven"], {})}
    if options.pop("dataset", False):
        source = {"train_dataset": PROMPTS}
    if options.pop("evaluate", False):
        source["eval_dataset"] = PROMPTS[:2]
    trainer = RLRTrainer(RLRConfig(output_dir=str(folder), **options), rewards, sd_pipeline=pipeline, **source)
    for name, parameter in trainer.policy.named_parameters():
        if "lora_B" in name:  # starts at 0, and would hide half of the gradient
            parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    return trainer


def _saved(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors")) or sorted((folder / "unet").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _digest(tensors: dict[str, Any]) -> dict[str, Any]:
    """SHA-256 of all bytes, and the sum of all magnitudes, which tells a rounding from a mistake."""
    state = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        state.update(tensor.cpu().contiguous().float().numpy().tobytes())
    return {"sha256": state.hexdigest(), "magnitude": sum(float(t.double().abs().sum()) for t in tensors.values())}


def main() -> None:
    import torch

    from rlr_trainer import digits

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    _PIPELINE.append(digits.load_pipeline())
    runs = DISTRIBUTED if distributed else RUNS
    curves = {}
    with tempfile.TemporaryDirectory() as own:
        base = Path(os.environ.get("FROZEN_FOLDER", own))  # one that all processes know
        for name in sys.argv[2:] or runs:
            folder = base / name
            curves[name] = curve(name, runs[name], folder, copy.deepcopy(_PIPELINE[0]))
    if int(os.environ.get("RANK", "0")) == 0:
        Path(sys.argv[1]).write_text(json.dumps({"machine": machine(), "curves": curves}, indent=0) + "\n")


if __name__ == "__main__":
    main()
