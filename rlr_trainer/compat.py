"""Everything that differs between versions of TRL and transformers."""

from __future__ import annotations

from typing import Any

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


def is_ddpo_config(config: Any) -> bool:
    """Whether `config` is TRL's DDPOConfig (looked up by name: TRL 0.24 and later have none)."""
    return any(cls.__name__ == "DDPOConfig" for cls in type(config).__mro__)


def is_alignprop_config(config: Any) -> bool:
    """Whether `config` is TRL's AlignPropConfig."""
    return any(cls.__name__ == "AlignPropConfig" for cls in type(config).__mro__)
