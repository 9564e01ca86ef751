"""The average of the trained weights: its formula, and where it is used."""

import contextlib
import copy

import pytest
import torch

from rlr_trainer import digits
from rlr_trainer.pipelines import LORA_FILE
from rlr_trainer.pipelines.average import WeightAverage

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}


def averaged_by_hand(start, history, decay):
    """The decay at update n is min(decay, n / (9 + n)), and 0 at the first, as diffusers' EMAModel has it."""
    average = {name: value.clone() for name, value in start.items()}
    for n, weights in enumerate(history, 1):
        factor = min(decay, n / (9 + n)) if n > 1 else 0.0
        average = {name: factor * average[name] + (1 - factor) * weights[name] for name in weights}
    return average


@pytest.fixture
def followed():
    """A parameter, its average, and a function that takes an update."""
    parameter = torch.nn.Parameter(torch.ones(2))
    average = WeightAverage({"w": parameter}, 0.15)

    def update(value):
        with torch.no_grad():
            parameter.fill_(value)
        average.on_step_end(None, None, None)

    return parameter, average, update


def test_follows_the_weights_and_gives_them_back(followed):
    parameter, average, update = followed
    values = [2.0, -1.0, 0.5, 7.0]
    for value in values:
        update(value)
    expected = averaged_by_hand({"w": torch.ones(2)}, [{"w": torch.full((2,), value)} for value in values], 0.15)["w"]
    with average.applied():
        with average.applied():  # nested: nothing more happens
            torch.testing.assert_close(parameter.detach(), expected)
        torch.testing.assert_close(parameter.detach(), expected)
    assert parameter.tolist() == [7, 7]
    assert abs(float(expected[0]) - 7) > 0.1


def test_weights_come_back_after_an_error(followed):
    parameter, average, update = followed
    update(2.0)
    with pytest.raises(RuntimeError, match="on purpose"), average.applied():
        raise RuntimeError("on purpose")
    assert parameter.tolist() == [2, 2]


def test_a_checkpoint_has_the_count_and_the_weights_are_the_average(followed):
    parameter, average, update = followed
    update(2.0)
    again = WeightAverage({"w": parameter}, 0.15)
    again.load_state_dict(average.state_dict())
    assert again.updates == average.updates == 1
    with again.applied():
        assert parameter.tolist() == [2, 2]


@pytest.mark.medium
def test_pictures_evaluation_and_the_saved_weights_are_the_average_s(make_trainer, pipeline):
    rows = [{"prompt": digits.PROMPT}] * 3
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), ema_decay=0.15, max_steps=4, learning_rate=1e-2, eval_dataset=rows)
    trainer.train()
    pictures, reward = trainer.generate([digits.PROMPT] * 2), trainer.evaluate()["eval_reward"]
    trainer.save_model("saved")
    with trainer.parts.weights.averaged():
        average = weights_of(trainer)
    base = copy.deepcopy(pipeline)
    base.load_lora_weights("saved", weight_name=LORA_FILE)
    reloaded = make_trainer(sd_pipeline=base, output_dir="again", eval_dataset=rows)
    for (name, tensor), expected in zip(weights_of(reloaded).items(), average.values(), strict=True):
        assert torch.equal(tensor, expected), name
    torch.testing.assert_close(reloaded.generate([digits.PROMPT] * 2), pictures, rtol=0, atol=1e-5)
    assert reloaded.evaluate()["eval_reward"] == pytest.approx(reward, abs=1e-6)
    trainer.parts.evaluator.averaged = contextlib.nullcontext
    assert not torch.allclose(trainer.generate([digits.PROMPT] * 2), pictures, atol=1e-4)


@pytest.mark.medium
def test_the_best_checkpoint_brings_its_average(make_trainer):
    trainer = make_trainer(
        ema_decay=0.15, eval_dataset=[{"prompt": digits.PROMPT}] * 4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_reward", max_steps=4, learning_rate=2e-2,
    )  # fmt: skip
    trainer.train()
    best = max(row["eval_reward"] for row in trainer.state.log_history if "eval_reward" in row)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, float("nan")])
def test_decay_outside_its_range_is_refused(make_trainer, value):
    with pytest.raises(ValueError, match="ema_decay=.*must lie between 0 and 1"):
        make_trainer(ema_decay=value)
