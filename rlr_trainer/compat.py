"""Everything that differs between versions of TRL and transformers."""

from __future__ import annotations

import transformers

try:
    from trl.trainer.base_trainer import _BaseTrainer as _TRLBaseTrainer
except ImportError:  # TRL 0.23 has no common base: its trainers subclass transformers.Trainer and bring these members themselves

    class _TRLBaseTrainer(transformers.Trainer):  # type: ignore[no-redef]
        _tag_names: list[str] = []
        _name = "Base"
        _paper: dict[str, str] = {}
        _template_file: str | None = None


class BaseTrainer(_TRLBaseTrainer):
    """TRL's trainer base, the same members in every supported version."""

    def _send_telemetry(self) -> None:
        """TRL reports its own trainers' use; this library reports nothing."""
