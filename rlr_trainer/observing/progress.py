"""Progress bars: the reward behind Trainer's, and one of a rollout."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback
from transformers.utils import is_in_notebook


class RewardProgress(ProgressCallback):
    """Trainer's progress bar with the reward behind it, in place of a printed line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.3f}")


class RolloutBar:
    """A bar inside Trainer's own while a rollout is sampled and scored; quiet when disabled, and where it would fill a file.

    That is, when the standard error is no terminal, unless this is a notebook.

    Args:
        batches: sampling batches of the rollout.
        num_steps: denoising steps of each.
        disable: show nothing.
    """

    def __init__(self, batches: int, num_steps: int, disable: bool) -> None:
        quiet = disable or not (sys.stderr.isatty() or is_in_notebook())
        self.bar = tqdm(total=batches * num_steps, desc="sampling", leave=False, disable=quiet, position=1)

    def __enter__(self) -> RolloutBar:
        return self

    def __exit__(self, *stopped: object) -> None:
        self.bar.close()

    def step(self, step: int) -> None:
        """A denoising step is done."""
        self.bar.update(1)
