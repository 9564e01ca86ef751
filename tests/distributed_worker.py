"""Run by torchrun in tests/training/test_distributed.py: does the jobs of FOLDER/jobs.json one after the other, one file per job and rank.

Starting two interpreters takes longer than any job, so many jobs share a start. Usage: distributed_worker.py FOLDER
"""

import contextlib
import copy
import json
import os
import random
import sys
import traceback
from pathlib import Path

import torch
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from families.tiny import sd3, sdxl
from transformers import TrainerCallback

from rlr_trainer import RLRConfig, RLRTrainer, digits

RANK = int(os.environ.get("RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
ROWS = [{"prompt": digits.class_prompt(d), "bias": d / 10} for d in range(6)]


def right(images, prompts, metadata):
    """Light on the right side, in a smooth curve, and what the row brings."""
    place = torch.linspace(-1, 1, images.shape[-1])
    bias = torch.tensor([m.get("bias", 0.0) for m in metadata])
    return torch.tanh(4 * (images * place).mean((1, 2, 3))) + bias


def contrast(images, prompts, metadata):
    return images.flatten(1).std(1)


class Recorder(TrainerCallback):
    """Gradients of every update before the optimizer, the prompts of every rollout, and what is to happen on the way."""

    def __init__(self, fault=None):
        self.gradients, self.prompts, self.fault = [], [], fault

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        )

    def on_rollout_end(self, args, state, control, rollout=None, **kwargs):
        self.prompts.append(rollout.prompts)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.fault == "signal":
            Path(args.output_dir, f"process-{RANK}").write_text(str(os.getpid()))


def whole(tensor):
    """A copy of a tensor, put together where it is spread over processes."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def own_prompt():
    """A generator of the function's own, with another state in every process."""
    generator = random.Random(RANK)

    def prompt():
        row = generator.choice(ROWS)
        return row["prompt"], {"bias": row["bias"]}

    return prompt


def make(folder, job, pipeline, recorder, hook):
    options = {
        "output_dir": str(folder / "run"), "sample_num_steps": 4, "sample_guidance_scale": 1.0, "max_steps": 2, "lora_r": 2,
        "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.0, "num_log_images": 0,
    } | job.get("options", {})  # fmt: skip
    batch = options.pop("batch", 4) // PROCESSES  # of all processes
    options.setdefault("per_device_train_batch_size", batch)
    if "sampled" in options:
        options["sample_batch_size"] = options.pop("sampled") // PROCESSES
    rewards = [right, contrast] if job.get("rewards") == 2 else right
    prompts = {"prompt_function": own_prompt()} if job.get("prompts") == "function" else {"train_dataset": ROWS}
    trainer = RLRTrainer(
        RLRConfig(**options), rewards, sd_pipeline=pipeline, image_samples_hook=hook, callbacks=[recorder],
        eval_dataset=ROWS[:3] if job.get("evaluate") else None, **prompts,
    )  # fmt: skip
    for name, parameter in trainer.policy.trainable_parameters().items():
        if "lora_B" in name:  # starts at 0, and would hide half of the gradient
            parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    return trainer


@contextlib.contextmanager
def as_if_sharded(kind):
    """Inside, accelerate takes up the FSDP2 that it was launched with on CPUs too, where it leaves it out by itself."""
    if kind is None:
        yield
        return
    plain = accelerate_state.PartialState.__init__

    def initialize(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    before = os.environ["FSDP_STATE_DICT_TYPE"]
    os.environ["FSDP_STATE_DICT_TYPE"] = kind
    accelerate_state.PartialState.__init__ = initialize
    try:
        yield
    finally:
        accelerate_state.PartialState.__init__ = plain
        os.environ["FSDP_STATE_DICT_TYPE"] = before


def train(folder, job, pipeline):
    recorder, hooked = Recorder(job.get("fault")), []
    trainer = make(folder, job, pipeline, recorder, lambda batches, step, tracker: hooked.append((step, len(batches))))
    if job.get("fault") == "disk" and RANK == 0:
        trainer.parts.adapter.save_lora = lambda directory: Path("/dev/full").write_text("x" * 10_000)
    trainer.train(resume_from_checkpoint=job.get("resume"))
    sharded = any(hasattr(p, "full_tensor") for p in trainer.policy.parameters())
    assert sharded == bool(job.get("fsdp")), "not trained as the job says"
    if job.get("save"):
        trainer.save_pretrained(str(folder / "saved"))
    with trainer.parts.weights.averaged():
        averaged = {name: whole(p) for name, p in trainer.policy.trainable_parameters().items()}
    return {
        "gradients": recorder.gradients,
        "weights": {name: whole(p) for name, p in trainer.policy.trainable_parameters().items()},
        "averaged": averaged,
        "prompts": recorder.prompts,
        "hooked": hooked,
        "history": [row for row in trainer.state.log_history if "loss" in row],
        "evaluation": trainer.evaluate() if job.get("evaluate") else None,
        "pictures": [row.prompt for row, _ in trainer.parts.pictures.rows()] if trainer.args.num_log_images else None,
        "updates": trainer.state.global_step,
    }


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    pipelines = {None: digits.load_pipeline(), "sdxl": sdxl.make_pipeline(), "sd3": sd3.make_pipeline()}
    for job in json.loads((folder / "jobs.json").read_text()):
        place = folder / job["name"]
        place.mkdir(exist_ok=True)
        try:
            with as_if_sharded(job.get("fsdp")):
                result = train(place, job, copy.deepcopy(pipelines[job.get("pipeline")]))
        except ValueError as error:  # refused, by every process alike
            result = {"refused": f"{type(error).__name__}: {error}"}
        except Exception:
            (place / f"error{RANK}.txt").write_text(traceback.format_exc())
            raise
        torch.save(result, place / f"rank{RANK}.pt")


if __name__ == "__main__":
    main()
