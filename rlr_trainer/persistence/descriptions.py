"""What `provenance` records of a reward or of prompts, as text. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_words(described: Mapping[str, Any]) -> str:
    """A description as one line."""
    if "rows" in described:
        first = described.get("first")
        shown = f" ({first[0]!r:.60}{', ...' if described['rows'] != 1 else ''})" if isinstance(first, list) and first else ""
        return f"{described['rows']} prompt{'s' if described['rows'] != 1 else ''}{shown}, sha256 {described.get('sha256')}"
    options = described.get("options")
    told = ", ".join(f"{name}={value!r}" for name, value in options.items()) if isinstance(options, dict) else ""
    return (
        str(described.get("function"))
        + (f"({told})" if told else "")
        + (f", code {described['code']}" if "code" in described else "")
    )
