"""Log lines as text, and as rows of a notebook's table."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from rlr_trainer.observing.lines import duration, line_of

AT = "update   7/100"
UPDATE = {"loss": -0.1, "grad_norm": 0.25, "learning_rate": 3e-4, "reward": 0.123456, "reward_std": 0.05, "samples_dropped": 0.0,
          "time/sample": 1.0, "epoch": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    ("logs", "text"),
    [
        (UPDATE, f"{AT}  reward 0.1235 ± 0.05  gradient 0.25  lr 0.0003  2.5 s"),
        (UPDATE | {"kl": 0.0123, "samples_dropped": 2.0}, f"{AT}  reward 0.1235 ± 0.05  gradient 0.25  kl 0.0123  lr 0.0003  2 dropped  2.5 s"),
        ({"loss": 0.1, "grad_norm": 0.5, "epoch": 1.0}, f"{AT}  gradient 0.5  2.5 s"),  # a further update of the rollout
        ({"eval_reward": 0.5, "eval_reward_std": 0.1, "eval_runtime": 3.0}, "after 7 updates: eval_reward 0.5 ± 0.1"),
        ({"eval_cats_reward": 0.5, "eval_reward": 1.0}, "after 7 updates: eval_cats_reward 0.5, eval_reward 1"),
        ({"train_runtime": 17.67, "train_loss": 0.0}, "trained 7 updates in 18 s"),
        ({"mine": 0.51234, "epoch": 2.0}, "after 7 updates: mine 0.5123"),
    ],
)  # fmt: skip
def test_a_line(logs, text):
    assert line_of(logs, 7, 100, 2.5) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (125, "2 min 5 s"), (12_000, "3 h 20 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def shown(monkeypatch):
    """What a notebook shows: one text per output, the last state of each."""
    outputs = []

    class Output:
        def __init__(self, html):
            outputs.append(html)
            self.number = len(outputs) - 1

        def update(self, html):
            outputs[self.number] = html

    display = ModuleType("IPython.display")
    display.HTML, display.display = str, lambda html, display_id: Output(html)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    sys.modules["IPython"].display = display
    for name in ("transformers.utils.notebook", "rlr_trainer.observing.notebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield outputs
    for name in ("transformers.utils.notebook", "rlr_trainer.observing.notebook"):
        sys.modules.pop(name, None)


@pytest.mark.medium
def test_a_notebook_has_a_table_with_the_reward_and_no_stale_bar(shown, make_trainer, tmp_path, monkeypatch):
    from transformers.utils.notebook import NotebookProgressCallback

    from rlr_trainer.observing import notebook
    from rlr_trainer.observing.progress import in_own_form
    from rlr_trainer.training import running

    (table,) = in_own_form([NotebookProgressCallback()])
    assert isinstance(table, notebook.RewardTable)
    monkeypatch.setattr(running, "is_in_notebook", lambda: True)
    options = {
        "callbacks": [table],
        "eval_dataset": ["a handwritten digit"],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "sample_num_steps": 2,
    }
    trainer = make_trainer(**options)
    trainer.evaluate()
    trainer.train()
    assert len(shown) == 2 and "<progress" not in shown[0]  # that of the evaluation before
    assert "value='2' max='2'" in shown[1]
    for text in (
        "<th>Reward</th>",
        "<th>eval_reward</th>",
        "<th>Gradient norm</th>",
        f"<td>{trainer.state.log_history[1]['reward']:.4g}</td>",
    ):
        assert text in shown[1], text

    def fails(images, prompts, metadata):
        if len(shown) == 3 and "value='1'" in shown[2]:
            raise ValueError("no more")
        return images.mean(dim=(1, 2, 3))

    again = make_trainer(**options, reward_function=fails, check_reward=False)  # the cell is run again, in the same folder
    with pytest.raises(ValueError, match="no more") as ended:
        again.train()
    assert again.args.output_dir == str(tmp_path / "run-2")
    assert "No checkpoint was written before" in ended.value.__notes__[0]
    assert "value='1' max='2'" in shown[2] and "stopped]" in shown[2]
    assert table.training_tracker is None


def test_rows_beyond_the_last_ones_are_dropped(shown):
    notebook = importlib.import_module("rlr_trainer.observing.notebook")
    table, state = notebook.RewardTable(), SimpleNamespace(max_steps=200, global_step=0)
    table.on_train_begin(SimpleNamespace(eval_strategy="no"), state, None)
    for state.global_step in range(1, 101):
        table.on_log(None, state, None, logs={"reward": 0.5, "loss": 0.0})
    assert shown[0].count("<tr>") == notebook.ROWS and "<td>100</td>" in shown[0]
