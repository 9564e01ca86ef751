"""Numbers, times and values as text."""

from __future__ import annotations

import datetime
import json
import math
import string
from typing import Any

from rlr_trainer.observing.report.series import Mean

UNKNOWN = "\N{EN DASH}"
LONGEST_VALUE = 400  # characters of an option's value


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, from there on a whole number with its thousands separated; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return _minus(f"{value:,.0f}" if 10**digits <= abs(value) < 1e9 else f"{value:.{digits}g}")


def count(value: float | None) -> str:
    """A whole number, thousands separated."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:,.0f}"


def with_error(mean: Mean | None) -> str:
    """`0.123 ± 0.004`: as many decimals as two digits of the error have."""
    if mean is None:
        return UNKNOWN
    if mean.error is None or not 1e-6 < mean.error < 1e6:
        return number(mean.value)
    decimals = max(0, 1 - math.floor(math.log10(mean.error)))
    return f"{_minus(f'{mean.value:,.{decimals}f}')} ± {mean.error:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    """`0:03:20`, `2 days, 3:00:00`."""
    return UNKNOWN if seconds is None or not math.isfinite(seconds) else str(datetime.timedelta(seconds=round(seconds)))


def value_text(value: Any) -> str:
    """An option's value as a reader writes it."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, float) and math.isfinite(value):
        text = f"{value:.12g}"
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
        text = {"null": "none"}.get(text, text)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def shorten(text: str, length: int) -> str:
    """At most `length` characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def letters(index: int) -> str:
    """A, B, ..., Z, A1, B1, ...: short names of runs."""
    return f"{string.ascii_uppercase[index % 26]}{index // 26 or ''}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text
