"""TRL's trainer base, which only newer versions of TRL have."""

from __future__ import annotations

import transformers

try:
    from trl.trainer.base_trainer import _BaseTrainer as TRLBaseTrainer
except ImportError:  # TRL 0.23 has no common base: its trainers subclass transformers.Trainer and bring these members themselves

    class TRLBaseTrainer(transformers.Trainer):  # type: ignore[no-redef]
        _tag_names: list[str] = []
        _name = "Base"
        _paper: dict[str, str] = {}
        _template_file: str | None = None


__all__ = ["TRLBaseTrainer"]
