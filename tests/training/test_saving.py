"""The updates between two checkpoints where nobody has chosen them."""

from types import SimpleNamespace

import pytest

from rlr_trainer import RLRConfig
from rlr_trainer.training.saving import default_steps, save_steps_of


@pytest.mark.parametrize(("updates", "steps"), [(1, 1), (3, 1), (4, 1), (40, 10), (41, 11), (400, 100), (10_000, 100)])
def test_a_quarter_of_the_run_and_no_more_than_a_hundred(updates, steps):
    assert default_steps(updates) == steps <= updates
    assert default_steps(updates, 6) % 6 == 0


def test_the_default_gives_way_to_a_choice(tmp_path):
    assert not RLRConfig(output_dir=str(tmp_path), use_cpu=True).save_steps_chosen
    assert RLRConfig(output_dir=str(tmp_path), use_cpu=True, save_steps=100).save_steps_chosen
    assert "save_steps" not in RLRConfig(output_dir=str(tmp_path), use_cpu=True).changed_options()
    args = SimpleNamespace(load_best_model_at_end=True, eval_strategy="steps", eval_steps=4)
    assert save_steps_of(args, 40) == 12
