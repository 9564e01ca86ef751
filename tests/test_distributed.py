"""Two processes with half the batch each compute what one computes with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "distributed_worker.py"
ROOT = WORKER.parent.parent


def launch(folder, processes, options):
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", "localhost:0", str(WORKER), str(folder), json.dumps(options)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "rlr"},
        {"estimator": "ddpo", "num_images_per_prompt": 2, "advantage": "leave_one_out"},
        {"estimator": "ddpo", "advantage": "per_prompt", "per_prompt_min_count": 2},
        {"estimator": "rlr_paper", "zo_num_perturbations": 2},
        {"estimator": "sqdf"},
        {"estimator": "rlr", "gradient_accumulation_steps": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_two_processes_equal_one(tmp_path, options):
    (one,) = launch(tmp_path / "one", 1, {"per_device_train_batch_size": 4} | options)
    two = launch(tmp_path / "two", 2, {"per_device_train_batch_size": 2} | options)
    for name, weight in two[0]["weights"].items():
        assert torch.equal(weight, two[1]["weights"][name]), f"{name} differs between the ranks"
    expected, found = one["gradients"][0], two[0]["gradients"][0]
    assert expected.keys() == found.keys()
    assert expected
    largest = max(float(g.abs().max()) for g in expected.values())
    residuals = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).abs() / largest
    # zeroth order divides differences of rewards by zo_scale = 0.01, and with them their rounding
    amplification = 100 if "zo_num_perturbations" in options else 1
    assert float(residuals.max()) < 1e-4 * amplification
    assert float(residuals.mean()) < 1e-6 * amplification
    assert two[0]["history"][0]["reward"] == pytest.approx(one["history"][0]["reward"], abs=1e-5)
    assert two[0]["history"][0]["reward_queries"] == one["history"][0]["reward_queries"]
