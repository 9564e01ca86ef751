"""The average of the trained weights: its formula, and where it is used."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from rlr_trainer import digits
from rlr_trainer.pipelines import LORA_FILE
from rlr_trainer.pipelines.average import WeightAverage

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}


class History(TrainerCallback):
    """The weights after every update."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


def averaged_by_hand(start, history, decay):
    """decay_n = min(decay, (1 + n) / (10 + n)) after n updates, and 0 at the first, as diffusers' EMAModel has it."""
    average = {name: value.clone() for name, value in start.items()}
    for number, weights in enumerate(history):
        factor = min(decay, (1 + number) / (10 + number)) if number else 0.0
        average = {name: factor * average[name] + (1 - factor) * weights[name] for name in weights}
    return average


def test_follows_the_weights_and_gives_them_back(make_trainer):
    history = History()
    trainer = make_trainer(ema_decay=0.15, max_steps=4, learning_rate=1e-2, callbacks=[history])
    start = weights_of(trainer)
    trainer.train()
    expected = averaged_by_hand(start, history.weights, 0.15)
    trained = weights_of(trainer)
    with trainer.averaged_weights():
        with trainer.averaged_weights():  # nested: nothing more happens
            inside = weights_of(trainer)
        assert all(torch.equal(inside[name], tensor) for name, tensor in weights_of(trainer).items())
    for name, tensor in inside.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(inside[name], trained[name]) for name in trained)
    assert all(torch.equal(trained[name], tensor) for name, tensor in weights_of(trainer).items())


def test_weights_come_back_after_an_error():
    parameter = torch.nn.Parameter(torch.ones(2))
    average = WeightAverage({"w": parameter}, 0.9)
    with torch.no_grad():
        parameter += 1
    seen = []

    def fail():
        with average.applied():
            seen.append(parameter.detach().clone())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(seen[0], torch.ones(2))
    assert torch.equal(parameter, torch.full((2,), 2.0))


def test_the_training_itself_does_not_change(make_trainer, pipeline):
    weights = []
    for options in ({}, {"ema_decay": 0.5}):
        trainer = make_trainer(
            sd_pipeline=copy.deepcopy(pipeline), overwrite=True, max_steps=3, eval_strategy="steps", eval_steps=1,
            eval_dataset=[{"prompt": digits.PROMPT}] * 2, **options,
        )  # fmt: skip
        trainer.train()
        weights.append(weights_of(trainer))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_pictures_evaluation_and_the_saved_weights_are_the_average_s(make_trainer, pipeline):
    rows = [{"prompt": digits.PROMPT}] * 3
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), ema_decay=0.15, max_steps=4, learning_rate=1e-2, eval_dataset=rows)
    trainer.train()
    pictures, reward = trainer.generate([digits.PROMPT] * 2), trainer.evaluate()["eval_reward"]
    trainer.save_model("saved")
    with trainer.averaged_weights():
        average = weights_of(trainer)
    base = copy.deepcopy(pipeline)
    base.load_lora_weights("saved", weight_name=LORA_FILE)
    reloaded = make_trainer(sd_pipeline=base, output_dir="again", eval_dataset=rows)
    for (name, tensor), expected in zip(weights_of(reloaded).items(), average.values(), strict=True):
        assert torch.equal(tensor, expected), name
    torch.testing.assert_close(reloaded.generate([digits.PROMPT] * 2), pictures, rtol=0, atol=1e-5)
    assert reloaded.evaluate()["eval_reward"] == pytest.approx(reward, abs=1e-6)
    trainer.average = None
    assert not torch.allclose(trainer.generate([digits.PROMPT] * 2), pictures, atol=1e-4)


def test_a_checkpoint_holds_both(make_trainer):
    trainer = make_trainer(ema_decay=0.15, max_steps=3, save_strategy="steps", save_steps=3, learning_rate=1e-2, output_dir="run")
    trainer.train()
    from safetensors.torch import load_file

    raw, average = (load_file(Path("run/checkpoint-3") / folder / LORA_FILE) for folder in (".", "average"))
    assert raw.keys() == average.keys()
    assert any(not torch.equal(raw[name], average[name]) for name in raw)


def test_the_best_checkpoint_brings_its_average(make_trainer):
    trainer = make_trainer(
        ema_decay=0.15, eval_dataset=[{"prompt": digits.PROMPT}] * 4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_reward", max_steps=4, learning_rate=2e-2,
    )  # fmt: skip
    trainer.train()
    best = max(row["eval_reward"] for row in trainer.state.log_history if "eval_reward" in row)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(best, abs=1e-6)


def test_resuming_a_run_without_an_average_starts_one(make_trainer, pipeline, caplog):
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": "run"}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=1, **options).train()
    resumed = make_trainer(sd_pipeline=copy.deepcopy(pipeline), max_steps=2, ema_decay=0.5, **options)
    resumed.train(resume_from_checkpoint=True)
    assert "ema_decay=None -> 0.5" in caplog.text
    assert resumed.average.updates == 1


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, float("nan")])
def test_decay_outside_its_range_is_refused(make_trainer, value):
    with pytest.raises(ValueError, match="ema_decay=.*must lie between 0 and 1"):
        make_trainer(ema_decay=value)


def test_everything_large_in_an_experience_moves(make_trainer):
    """Rollouts kept on the CPU: shown with the device that holds no data, as there may be no accelerator."""
    trainer = make_trainer(estimator="rlr", kl_coef=0.1)
    experience = trainer._collector(trainer.model).collect(0)[0][0]
    moved = experience.to("meta")
    tensors = [t for part in (moved.rollout.latents, moved.rollout.noises, moved.rollout.means) for t in part]
    tensors += [*moved.conditioning.positive.values(), moved.reward_gradient, moved.advantage, moved.scale, moved.divergence_to_go]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert all(tensor.device.type == "cpu" for tensor in experience.rollout.latents)
