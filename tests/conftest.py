"""Fixtures shared by the tests: the bundled model, loaded once, and small trainers on it."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers.utils.logging  # its handler takes the stderr of the moment: it must not be that of one captured test
import pytest
import torch
import transformers.trainer
import transformers.utils.logging
from hub_stand_in import Hub

diffusers.utils.logging.get_logger("diffusers")
transformers.utils.logging.get_logger("transformers")

# The models are tiny: a second thread gains a tenth on a quiet machine and costs several times that on a busy one.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start
torch.set_num_threads(1)
torch.set_flush_denormal(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests may take 30 minutes: what takes two on a quiet machine came near the usual limit of ten on a busy one."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(autouse=True)
def _precision_of_its_own() -> Iterator[None]:
    """transformers 4 leaves a run's precision in the environment, where the next run, or a program that a test starts, would find it."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """A test that leaves the package's logger silent fails itself, and not another test that looks for a warning after it."""
    logger = logging.getLogger("rlr_trainer")
    before = logger.level
    yield
    after = logger.level
    logger.setLevel(before)
    assert after == before


@pytest.fixture
def in_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are those of the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A stand-in that takes the uploads of either version of transformers."""
    stand_in = Hub()
    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda *arguments, **keywords: stand_in)
    else:
        monkeypatch.setattr(transformers.trainer, "create_repo", stand_in.create_repo)
        monkeypatch.setattr(transformers.trainer, "upload_folder", stand_in.upload_folder)
    return stand_in


@pytest.fixture(scope="session")
def digits_pipeline_master() -> Any:
    """The bundled pipeline; copy it before training."""
    from rlr_trainer import digits

    return digits.load_pipeline()


@pytest.fixture
def pipeline(digits_pipeline_master: Any) -> Any:
    """A fresh copy of the bundled pipeline."""
    return copy.deepcopy(digits_pipeline_master)


@pytest.fixture(scope="session")
def seven() -> Callable[..., torch.Tensor]:
    """Differentiable reward: the bundled classifier's probability of a seven."""
    from rlr_trainer.digits.rewards import digit_reward

    return digit_reward(7)


@pytest.fixture
def make_trainer(pipeline: Any, seven: Callable[..., torch.Tensor], tmp_path: Path) -> Callable[..., Any]:
    """Builds an `RLRTrainer` on the bundled model: 4 steps, batch 4, 2 updates, no output but files in a temporary folder."""
    from rlr_trainer import RLRConfig, RLRTrainer, digits

    def make(**options: Any) -> Any:
        arguments = {
            "reward_function": options.pop("reward_function", seven),
            "prompt_function": options.pop("prompt_function", lambda: (digits.PROMPT, {})),
            "sd_pipeline": options.pop("sd_pipeline", pipeline),
        }
        for name in (
            "image_samples_hook",
            "train_dataset",
            "eval_dataset",
            "peft_config",
            "callbacks",
            "optimizers",
            "eval_reward_function",
        ):
            if name in options:
                arguments[name] = options.pop(name)
        if "train_dataset" in arguments:
            arguments["prompt_function"] = None
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "sample_num_steps": 4,
            "sample_guidance_scale": 1.0,
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "lora_r": 2,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "num_log_images": 0,
        }
        return RLRTrainer(RLRConfig(**(defaults | options)), **arguments)

    return make
