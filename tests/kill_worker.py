"""Program for tests/persistence/test_resume.py: trains in forked children that it kills. Usage: kill_worker.py

Forked, because a fresh interpreter needs seconds to import its libraries. Works in the current folder.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

torch.set_num_threads(1)

from rlr_trainer import RLRConfig, RLRTrainer, digits  # noqa: E402
from rlr_trainer.digits.rewards import digit_reward  # noqa: E402
from rlr_trainer.persistence.checkpoints import CheckpointStore  # noqa: E402

UPDATES, KILLS = 120, 12  # no life makes more than 9 updates or so, and the last one has some left
PIPELINE = digits.load_pipeline()
REWARD = digit_reward(7)


def prompt():
    return digits.class_prompt((random.randrange(10) + np.random.randint(10) + int(torch.randint(10, ()))) % 10), {}


def make(folder):
    settings = {
        "estimator": "rlr", "num_inner_epochs": 2, "sample_num_steps": 4, "sample_guidance_scale": 1.0, "per_device_train_batch_size": 4,
        "max_steps": UPDATES, "lora_r": 2, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
        "ema_decay": 0.9, "use_cpu": True, "disable_tqdm": True, "output_dir": folder,
    }  # fmt: skip
    return RLRTrainer(RLRConfig(**settings), REWARD, prompt, PIPELINE)


def train(folder):
    trainer = make(folder)
    trainer.train(resume_from_checkpoint=bool(CheckpointStore(folder).checkpoints()) or None)
    final = Path(folder, "final")
    final.mkdir()
    torch.save({name: p.detach() for name, p in trainer.policy.trainable_parameters().items()}, final / "weights.pt")
    torch.save(trainer.optimizer.state_dict(), final / "optimizer.pt")


def in_child(folder, log):
    """The process number of a child that trains."""
    child = os.fork()
    if child:
        return child
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    code = 1
    try:
        train(folder)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def newest(folder):
    return max((int(path.name.rpartition("-")[2]) for path in CheckpointStore(folder).checkpoints()), default=0)


def check_alive(child):
    if os.waitpid(child, os.WNOHANG)[0]:
        raise SystemExit(f"ended before it could be killed:\n{Path('killed.log').read_text()[-3000:]}")


def wait_for(child, update, folder):
    """Until the checkpoint of an update is there."""
    while newest(folder) < update:
        check_alive(child)
        time.sleep(0.002)


def wait_for_writing(child, folder):
    while not list(folder.glob("_incomplete-checkpoint-[0-9]*")):
        check_alive(child)


def kill_and_resume():
    with open("whole.log", "w") as log:
        _, status = os.waitpid(in_child("whole", log), 0)
    assert status == 0, Path("whole.log").read_text()[-3000:]
    delays, kills, half_written = random.Random(), 0, 0
    # a kill may find a run that has overwritten nothing yet: `overwrite` is not set, so a folder without a checkpoint is cleaned
    while True:
        folder = Path("killed")
        if folder.is_dir() and not CheckpointStore(folder).checkpoints():
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        with open("killed.log", "w") as log:
            child = in_child("killed", log)
            if kills < KILLS:
                wait_for(child, newest(folder) + delays.randrange(3), folder)
                time.sleep(delays.uniform(0, 0.2))
                if kills % 2:  # every other one waits for a checkpoint that is being written
                    wait_for_writing(child, folder)
                os.kill(child, signal.SIGKILL)
                kills += 1
            _, status = os.waitpid(child, 0)
        half_written += bool(list(folder.glob("_incomplete-checkpoint-[0-9]*")))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, Path("killed.log").read_text()[-3000:]
            break
    print(json.dumps({"kills": kills, "with_a_half_written_checkpoint": half_written}))


if __name__ == "__main__":
    kill_and_resume()
