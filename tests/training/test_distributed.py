"""Two processes with half the batch each compute what one computes with the whole batch; saving, resuming, ends and faults of a run."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import environment, torchrun

from rlr_trainer.estimators.presets import PRESETS
from rlr_trainer.persistence.checkpoints import CheckpointStore, check

WORKER = Path(__file__).parents[1] / "distributed_worker.py"
CONFIGS = WORKER.parent.parent / "examples" / "accelerate_configs"
pytestmark = pytest.mark.slow

# The batch of all processes is 4 unless a case says another. LoRA weights that do something, and a smooth reward.
CASES = {
    "rlr": {"options": {"estimator": "rlr"}},
    "rlr_black_box": {"options": {"estimator": "rlr_black_box", "noise_steps": [1, 2]}},
    "rlr_paper": {"options": {"estimator": "rlr_paper", "zo_num_perturbations": 2}},
    "ddpo": {"options": {"estimator": "ddpo"}},
    "flow_grpo": {"options": {"estimator": "flow_grpo"}, "pipeline": "sd3"},
    "mixgrpo": {"options": {"estimator": "mixgrpo", "noise_window_rollouts": 1}, "pipeline": "sd3"},
    "random_window": {
        "options": {"estimator": "ddpo", "noise_steps": 2, "noise_window": "random", "silent_estimator": "none", "seed": 1}
    },
    "draft": {"options": {"estimator": "draft"}},
    "alignprop": {"options": {"estimator": "alignprop"}},
    "full_bp": {"options": {"estimator": "full_bp"}},
    "sqdf": {"options": {"estimator": "sqdf"}},
    "es": {"options": {"estimator": "es", "zo_num_perturbations": 2}},
    "awm": {"options": {"estimator": "awm"}},
    "awm_off_policy": {"options": {"estimator": "awm", "num_inner_epochs": 2}},
    "nft": {"options": {"estimator": "nft", "old_policy_decay": [0, 0.5, 0.5]}},
    # the four pictures of a prompt are spread over both processes
    "leave_one_out": {"options": {"estimator": "ddpo", "advantage": "leave_one_out", "num_images_per_prompt": 4, "batch": 4}},
    "per_prompt": {
        "options": {
            "estimator": "ddpo",
            "advantage": "per_prompt",
            "num_images_per_prompt": 4,
            "per_prompt_min_count": 2,
            "batch": 8,
        }
    },
    "normalize_then_sum": {
        "options": {
            "estimator": "rlr",
            "reward_aggregation": "normalize_then_sum",
            "reward_weights": [1.0, -0.5],
            "num_images_per_prompt": 4,
        },
        "rewards": 2,
    },
    "kl": {"options": {"estimator": "rlr", "kl_coef": 0.1}},
    "kl_ddpo": {"options": {"estimator": "ddpo", "kl_coef": 0.1}},
    "average": {"options": {"estimator": "rlr", "ema_decay": 0.5}, "evaluate": True},
    "own_generator": {"options": {"estimator": "rlr", "num_log_images": 4}, "prompts": "function"},
    "offload": {"options": {"estimator": "rlr", "offload_rollouts": True, "num_inner_epochs": 2}},
    "accumulation": {"options": {"estimator": "rlr", "gradient_accumulation_steps": 2}},
    "whole_network": {"options": {"estimator": "rlr", "use_lora": False, "kl_coef": 0.1, "learning_rate": 1e-5}},
    "sd3": {"options": {"estimator": "rlr", "sample_guidance_scale": 4.0}, "pipeline": "sd3"},  # a transformer, and a flow
    # two text encoders, and inputs that belong to the batch
    "sdxl": {"options": {"estimator": "rlr", "sample_guidance_scale": 3.0}, "pipeline": "sdxl"},
}
SPLIT = ("rlr", "ddpo", "full_bp", "sqdf", "kl", "whole_network")  # run once more by one process, in two micro-batches


def command(folder, processes, config=None):
    if config is not None:
        return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), "--main_process_port", "0",
                str(WORKER), str(folder)]  # fmt: skip
    return torchrun(processes, WORKER, folder)


def launch(folder, processes, jobs, config=None):
    """Runs the jobs, each a dict with a name, under torchrun or `accelerate launch`; `results` reads what every rank wrote."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        command(folder, processes, config), cwd=folder, capture_output=True, text=True, timeout=1500, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def results(folder, name, processes=2):
    return [torch.load(folder / name / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


def residuals(expected, found):
    """Largest and mean difference of two gradients, in units of the largest entry."""
    assert expected.keys() == found.keys()
    assert expected
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).abs() / largest
    return float(difference.max()), float(difference.mean())


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert left
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---- the same gradients ----


SAVES = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
INNER = SAVES | {"estimator": "ddpo", "num_inner_epochs": 2}  # a rollout is two updates
STATE = SAVES | {"estimator": "rlr", "control_variate": True, "ho_start": "grad_norm", "ema_decay": 0.5}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed") / "two"
    for number in range(10, 60):  # of an earlier run: enough for two processes to get into each other's way
        (folder / f"overwritten/run/checkpoint-{number}/unet").mkdir(parents=True)
    jobs = [{"name": name} | case for name, case in CASES.items()]
    jobs += [
        {"name": "control", "options": {"estimator": "rlr", "control_variate": True}},
        {"name": "inner", "options": INNER, "save": True},
        {"name": "inner resumed", "options": INNER, "resume": str(folder / "inner/run/checkpoint-2")},
        {"name": "state", "options": STATE},
        {"name": "state resumed", "options": STATE, "resume": str(folder / "state/run/checkpoint-2")},
        {"name": "overwritten", "options": {"save_strategy": "steps", "save_steps": 2, "overwrite": True}},
    ]
    return launch(folder, 2, jobs)


@pytest.fixture(scope="module")
def one(two, tmp_path_factory):
    halves = {"sampled": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    jobs = [{"name": name} | case for name, case in CASES.items()]
    jobs += [CASES[name] | {"name": f"{name}-split", "options": CASES[name]["options"] | halves} for name in SPLIT]
    jobs += [
        {"name": "control", "options": {"estimator": "rlr", "control_variate": True}},
        {"name": "control-split", "options": {"estimator": "rlr", "control_variate": True} | halves},
        {"name": "inner resumed", "options": INNER, "resume": str(two / "inner/run/checkpoint-2")},
    ]
    return launch(tmp_path_factory.mktemp("distributed") / "one", 1, jobs)


def bound(name):
    """Bounds on the largest and the mean residual of the first update.

    One rounding is 2^-24 = 6e-8 of a number. An entry of a gradient is a sum over samples, steps and pixels whose terms cancel, after about
    a hundred layers forward and back: 1e-4 allows 1700 roundings of the largest entry, the mean of all entries 17. (One process that
    takes the same batch in two halves shows up to 1.2e-5 and 3e-7.) Zeroth order divides differences of rewards, and their
    rounding, by zo_scale = 0.01.
    """
    amplification = 100 if "zo_num_perturbations" in CASES[name]["options"] else 1
    return 1e-4 * amplification, 1e-6 * amplification


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradients_of_one(one, two, name):
    (expected,), found = results(one, name, 1), results(two, name)
    largest, mean = residuals(expected["gradients"][0], found[0]["gradients"][0])
    print(f"{name}: largest residual {largest:.1e}, mean {mean:.1e}")
    assert largest < bound(name)[0]
    assert mean < bound(name)[1]
    # Adam's first step divides every entry by its own size, rounding included, so the second update starts from slightly other weights
    assert residuals(expected["gradients"][1], found[0]["gradients"][1])[0] < 20 * bound(name)[0]
    assert_same(found[0]["gradients"][0], found[1]["gradients"][0])
    assert_same(found[0]["weights"], found[1]["weights"])
    assert_same(found[0]["averaged"], found[1]["averaged"])
    assert expected["prompts"] == found[0]["prompts"] == found[1]["prompts"]
    rows = expected["history"][0], found[0]["history"][0]
    for metric in ("reward", "reward_std", "kl", "diversity", "loss"):
        assert (metric in rows[0]) == (metric in rows[1])
        assert rows[1].get(metric, 0) == pytest.approx(rows[0].get(metric, 0), abs=1e-5, rel=1e-4), metric
    assert rows[1]["reward_queries"] == rows[0]["reward_queries"]


@pytest.mark.parametrize("name", SPLIT)
def test_the_residual_is_that_of_rounding(one, two, name):
    """One process that takes the batch in two halves is off by as much: the bounds hold for it too, and two processes add nothing beyond."""
    (whole,), (split,), found = results(one, name, 1), results(one, f"{name}-split", 1), results(two, name)
    natural = residuals(whole["gradients"][0], split["gradients"][0])
    print(f"{name}: two micro-batches of one process: largest residual {natural[0]:.1e}, mean {natural[1]:.1e}")
    assert natural[0] < bound(name)[0]
    assert natural[1] < bound(name)[1]
    assert residuals(whole["gradients"][0], found[0]["gradients"][0])[1] < 10 * natural[1]


def test_all_presets_are_covered():
    assert set(PRESETS) <= CASES.keys()


def test_a_control_variate_is_centred_and_fitted_over_all_samples(one, two):
    """So two processes give what one gives, and one process the same with smaller micro-batches."""
    (expected,), (split,), found = results(one, "control", 1), results(one, "control-split", 1), results(two, "control")
    for other in (split, found[0]):
        largest, mean = residuals(expected["gradients"][0], other["gradients"][0])
        assert largest < 1e-4
        assert mean < 1e-6


def test_evaluation_shares_the_work(one, two):
    (expected,), found = results(one, "average", 1), results(two, "average")
    assert found[0]["evaluation"]["eval_reward"] == pytest.approx(expected["evaluation"]["eval_reward"], abs=1e-5)
    assert found[0]["evaluation"]["eval_reward"] == found[1]["evaluation"]["eval_reward"]


def test_the_main_process_names_the_prompts_of_the_pictures(one, two):
    (expected,), found = results(one, "own_generator", 1), results(two, "own_generator")
    assert expected["pictures"] == found[0]["pictures"] == found[1]["pictures"]


def test_the_hook_is_called_once_per_rollout_on_the_main_process(two):
    first, second = results(two, "accumulation")
    assert first["hooked"] == [(0, 2), (1, 2)]
    assert second["hooked"] == []


# ---- saving and resuming ----


@pytest.mark.parametrize("name", ["inner", "state"])
def test_a_resumed_run_ends_bit_for_bit_the_same(two, name):
    for expected, found in zip(results(two, name), results(two, f"{name} resumed"), strict=True):
        assert found["updates"] == 4
        assert_same(expected["weights"], found["weights"])
        assert_same(expected["averaged"], found["averaged"])
    whole, resumed = (
        [{key: value for key, value in row.items() if not key.startswith("time/")} for row in results(two, run)[0]["history"]]
        for run in (name, f"{name} resumed")
    )
    assert whole == resumed


def test_what_two_processes_save(two):
    checkpoints = CheckpointStore(two / "inner/run").checkpoints()
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-4"]
    for folder in checkpoints:
        check(folder)
        names = {path.name for path in folder.iterdir()}
        assert names >= {"rlr_state.pt", "rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "pytorch_lora_weights.safetensors"}
    assert (two / "inner/saved/pytorch_lora_weights.safetensors").is_file()
    queries = results(two, "inner")[0]["history"][-1]["reward_queries"]  # of both processes
    assert f"4 updates, {queries} pictures scored by" in (two / "inner/saved/README.md").read_text()


def test_one_process_clears_the_folder_that_is_overwritten(two):
    assert [path.name for path in CheckpointStore(two / "overwritten/run").checkpoints()] == ["checkpoint-2"]


def test_one_process_goes_on_from_a_checkpoint_of_two(two, one):
    (found,), expected = results(one, "inner resumed", 1), results(two, "inner")[0]
    assert found["updates"] == 4
    for row, other in zip(found["history"], expected["history"], strict=True):
        for metric in ("reward", "reward_std", "reward_queries"):
            assert (metric in row) == (metric in other)
            assert row.get(metric, 0) == pytest.approx(other.get(metric, 0), abs=1e-5), metric
    assert residuals(expected["weights"], found["weights"])[0] < 1e-4


# ---- weights that are spread over the processes ----


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed") / "sharded"
    whole_network = {"estimator": "rlr", "use_lora": False, "learning_rate": 1e-5, "save_strategy": "steps", "save_steps": 1}
    lora = {"estimator": "rlr", "save_strategy": "steps", "save_steps": 1}
    jobs = [
        {"name": "lora", "options": lora, "save": True, "evaluate": True},
        {"name": "lora resumed", "options": lora, "resume": str(folder / "lora/run/checkpoint-1")},
        {"name": "network", "options": whole_network, "save": True},
        {"name": "network resumed", "options": whole_network, "resume": str(folder / "network/run/checkpoint-1")},
        {"name": "ddpo", "options": {"estimator": "ddpo"}},
        {"name": "full_bp", "options": {"estimator": "full_bp", "recompute": "graph"}},
        {"name": "accumulation", "options": CASES["accumulation"]["options"]},
        {"name": "kl", "options": CASES["kl"]["options"]},
        {"name": "whole_network", "options": CASES["whole_network"]["options"]},
        {"name": "sdxl"} | CASES["sdxl"],
    ]
    refused = [("es", {"estimator": "es", "zo_num_perturbations": 2}), ("sqdf", {"estimator": "sqdf"}), ("ema", {"ema_decay": 0.9}),
               ("start", {"ho_start": "grad_norm"}), ("norms", {"log_step_norms": True})]  # fmt: skip
    jobs += [{"name": name, "options": options} for name, options in refused]
    jobs = [job | {"fsdp": "FULL_STATE_DICT"} for job in jobs]
    jobs.append({"name": "files", "options": {"estimator": "rlr"}, "fsdp": "SHARDED_STATE_DICT"})
    return launch(folder, 2, jobs, "fsdp2.yaml")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("lora", "rlr"),
        ("ddpo", "ddpo"),
        ("full_bp", "full_bp"),
        ("accumulation", "accumulation"),
        ("kl", "kl"),
        ("whole_network", "whole_network"),
        ("sdxl", "sdxl"),
    ],
)
def test_fsdp_gives_the_gradients_of_ddp(two, sharded, name, plain):
    expected, found = results(two, plain)[0], results(sharded, name)[0]
    largest, mean = residuals(expected["gradients"][0], found["gradients"][0])
    print(f"fsdp {name}: largest residual {largest:.1e}, mean {mean:.1e}")
    assert largest < 1e-4
    assert mean < 1e-6
    assert not any(key.startswith("estimator/fo_grad_norm") for key in found["history"][0])


@pytest.mark.parametrize("name", ["lora", "network"])
def test_fsdp_resumes_bit_for_bit(sharded, name):
    for expected, found in zip(results(sharded, name), results(sharded, f"{name} resumed"), strict=True):
        assert_same(expected["weights"], found["weights"])


def test_fsdp_writes_whole_weights(sharded):
    """In the format of a run without it."""
    from safetensors.torch import load_file

    weights = results(sharded, "lora")[0]["weights"]
    written = load_file(sharded / "lora/saved/pytorch_lora_weights.safetensors")
    shapes = sorted(tuple(w.shape) for w in weights.values())
    assert sorted(tuple(w.shape) for w in written.values()) == shapes
    assert sum(float(w.double().sum()) for w in written.values()) == sum(float(w.double().sum()) for w in weights.values())
    network = {n.removeprefix("denoiser."): w for n, w in results(sharded, "network")[0]["weights"].items()}
    (file,) = (sharded / "network/saved/unet").glob("*.safetensors")
    found = load_file(file)
    for name, weight in network.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("es", "rest_estimator='zo' with FSDP: .*plain data parallelism"),
        ("sqdf", "the one-step prediction with FSDP"),
        ("ema", "ema_decay=0.9 with FSDP or DeepSpeed"),
        ("start", "ho_start='grad_norm' with FSDP"),
        ("norms", "log_step_norms=True with FSDP"),
        ("files", "fsdp_state_dict_type=SHARDED_STATE_DICT"),
    ],
)
def test_what_fsdp_refuses(sharded, name, message):
    for result in results(sharded, name):
        with pytest.raises(ValueError, match=message):
            raise ValueError(result["refused"])


# ---- DeepSpeed ----

SGD = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "weight_decay": 0.0}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_takes_the_step_of_ddp_and_resumes(tmp_path, monkeypatch):
    """Its engine shows no gradients: plain gradient descent shows them in the weights."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    cases = {name: CASES[name]["options"] | SGD for name in ("rlr", "ddpo", "full_bp", "sqdf", "kl", "whole_network")}
    jobs = [{"name": name, "options": options} for name, options in cases.items()]
    saves = {"estimator": "rlr", "save_strategy": "steps", "save_steps": 1}
    resumed = {"name": "resumed", "options": saves, "resume": str(tmp_path / "deepspeed/saves/run/checkpoint-1")}
    refused = [{"name": "es", "options": CASES["es"]["options"]}, {"name": "bf16", "options": {"bf16": True}}]
    launch(tmp_path / "ddp", 2, jobs, "ddp.yaml")
    launch(tmp_path / "deepspeed", 2, [*jobs, {"name": "saves", "options": saves}, resumed, *refused], "deepspeed_zero2.yaml")
    for name in cases:
        expected, found = results(tmp_path / "ddp", name)[0], results(tmp_path / "deepspeed", name)
        step = max(float(g.abs().max()) for g in expected["gradients"][0].values())
        weights = {key.removeprefix("module."): weight for key, weight in found[0]["weights"].items()}
        difference = torch.cat([(weights[key] - weight).flatten() for key, weight in expected["weights"].items()]).abs() / step
        print(f"deepspeed {name}: largest residual {float(difference.max()):.1e}, mean {float(difference.mean()):.1e}")
        assert float(difference.max()) < 1e-4
        assert float(difference.mean()) < 1e-6
        assert_same(found[0]["weights"], found[1]["weights"])
        norm = "estimator/ho_grad_norm"
        assert found[0]["history"][0].get(norm, 0) == pytest.approx(expected["history"][0].get(norm, 0), rel=1e-3)
    assert_same(results(tmp_path / "deepspeed", "saves")[0]["weights"], results(tmp_path / "deepspeed", "resumed")[0]["weights"])
    assert "rest_estimator='zo' with DeepSpeed" in results(tmp_path / "deepspeed", "es")[0]["refused"]
    assert "fp16 and bf16 with DeepSpeed" in results(tmp_path / "deepspeed", "bf16")[0]["refused"]


# ---- ends and faults ----


def start(folder, options, fault):
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([{"name": "job", "options": options, "fault": fault}]))
    return subprocess.Popen(
        command(folder, 2), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_sigterm_to_one_process_saves_a_checkpoint_and_ends_both(tmp_path):
    run = start(tmp_path, {"estimator": "rlr", "max_steps": 5000}, "signal")
    marks = [tmp_path / "job/run" / f"process-{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while not all(mark.is_file() and mark.read_text() for mark in marks):
        assert time.monotonic() < deadline
        assert run.poll() is None, run.stderr.read()[-3000:]
        time.sleep(0.2)
    workers = [int(mark.read_text()) for mark in marks]
    os.kill(workers[1], signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert all(gone(pid) for pid in workers)
    (checkpoint,) = CheckpointStore(tmp_path / "job/run").checkpoints()
    check(checkpoint)
    updates = checkpoint.name.removeprefix("checkpoint-")
    assert f"stopped after update {updates}, which is saved; continue with resume_from_checkpoint=True" in errors


def test_a_full_disk_ends_both_processes_with_the_error_of_one(tmp_path):
    run = start(tmp_path, {"estimator": "rlr", "max_steps": 5000, "save_strategy": "steps", "save_steps": 1}, "disk")
    _, errors = run.communicate(timeout=150)  # a hang would run into this
    assert run.returncode != 0
    assert re.search(r"OSError: cannot write .*checkpoint-1 .*No space left on device", errors), errors[-3000:]
    assert not list((tmp_path / "job/run").glob("*checkpoint*"))
