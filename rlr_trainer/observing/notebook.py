"""The progress of a run in a notebook: Trainer's bar, and a table with the reward. Needs IPython."""

from __future__ import annotations

from typing import Any

from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from rlr_trainer.persistence.metric_names import EVAL_REWARD

ROWS = 50  # the last ones; the whole table is drawn again at every log line
# Metric -> column. transformers' own table has the losses, which say little here.
COLUMNS = {"reward": "Reward", "reward_std": "Deviation", "grad_norm": "Gradient norm", "kl": "KL", "samples_dropped": "Dropped"}


def row_of(logs: dict[str, Any], step: int) -> dict[str, Any]:
    """A row of the table: column -> text; of a line that has neither a reward nor an evaluation nothing but the update."""
    shown = {column: logs[name] for name, column in COLUMNS.items() if name in logs and (name != "samples_dropped" or logs[name])}
    shown |= {name: value for name, value in logs.items() if EVAL_REWARD.fullmatch(name)}
    return {"Update": step} | {name: f"{value:.4g}" for name, value in shown.items()}


class RewardTable(NotebookProgressCallback):
    """transformers' bar and table, with the reward and the evaluations in it.

    The bar counts the updates that are done (transformers' is one ahead), and says so when the training was stopped.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins an empty table; a resumed run's bar begins where that run stood."""
        super().on_train_begin(args, state, control, **kwargs)
        self.training_tracker: Any = NotebookTrainingTracker(state.max_steps)
        self._rows: dict[int, dict[str, Any]] = {}
        self._reward = ""
        self._update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds a row, or an evaluation to the row of its update, and draws the last rows anew."""
        if self.training_tracker is None or not logs:
            return
        row = row_of(logs, state.global_step)
        if len(row) == 1:
            return
        self._reward = f"reward {row['Reward']}" if "Reward" in row else self._reward
        self._rows[state.global_step] = self._rows.get(state.global_step, {}) | row
        for step in list(self._rows)[:-ROWS]:
            del self._rows[step]
        columns = list(dict.fromkeys(name for kept in self._rows.values() for name in kept))
        table = [[kept.get(name, "") for name in columns] for kept in self._rows.values()]
        self.training_tracker.inner_table = [columns, *table]
        self._update(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The log line, which comes first, has put the evaluation into the table."""
        if self.training_tracker is not None:
            self.training_tracker.remove_child()
        elif self.prediction_bar is not None:
            self.prediction_bar.close()
        self.prediction_bar = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(state.global_step)
        self.training_tracker = None

    def close_bars(self) -> None:
        """Says of a training that ended by an error that it was stopped; no bar below it is left."""
        if self.training_tracker is not None:
            self.training_tracker.child_bar = None
            self.training_tracker.update(self.training_tracker.value or 0, force_update=True, comment="stopped")
        self.training_tracker = self.prediction_bar = None

    def _update(self, step: int) -> None:
        self.training_tracker.update(step, force_update=True, comment=self._reward or None)
