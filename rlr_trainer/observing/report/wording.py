"""Numbers, times and values as text."""

from __future__ import annotations

import json
import math
import string
from typing import Any

from rlr_trainer.observing.report.series import Mean

LONGEST_VALUE = 400  # characters of an option's value


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, thousands separated; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    rounded = abs(float(f"{value:.{digits - 1}e}"))  # 0.9999 is 1.00, not 1.000
    magnitude = math.floor(math.log10(rounded))
    if not -4 <= magnitude <= 8:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return _minus(f"{mantissa}e{int(exponent)}")
    return _minus(f"{value:,.{max(0, digits - 1 - magnitude)}f}")


def count(value: float | None) -> str:
    """A whole number, thousands separated."""
    return "\N{EN DASH}" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def with_error(mean: Mean | None) -> str:
    """`0.123 ± 0.004`: as many decimals as two digits of the error have, at most four significant digits of the value."""
    if mean is None:
        return "\N{EN DASH}"
    if mean.error is None or not 0 < mean.error < math.inf:
        return number(mean.value)
    if not 1e-4 <= max(abs(mean.value), mean.error) < 1e6:
        return f"{number(mean.value)} ± {number(mean.error, 2)}"
    decimals = max(0, 1 - math.floor(math.log10(mean.error)))
    if mean.value:
        decimals = min(decimals, max(0, 3 - math.floor(math.log10(abs(mean.value)))))
    decimals = min(decimals, 6)
    error = max(mean.error, 10.0**-decimals)  # never 0: rounded up to the last digit shown
    return f"{_minus(f'{mean.value:,.{decimals}f}')} ± {error:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    """`42 s`, `3 min 20 s`, `5 h 10 min`, `2 d 3 h`."""
    if seconds is None or not math.isfinite(seconds):
        return "\N{EN DASH}"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


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
