"""Numbers as a reader wants them: three figures, thousands apart, seconds as minutes."""

from __future__ import annotations

import json
import math
from typing import Any


def figures(value: float, digits: int = 3) -> str:
    """`value` to so many significant figures, without an exponent where it can be helped."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = math.floor(math.log10(abs(value)))
    if not -3 <= size < 9:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def power(value: float, digits: int = 2) -> str:
    """`value` as 1.5e-4, the way in which learning rates are written."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def value_text(value: Any, digits: int = 2) -> str:
    """A value as it is written in a recipe, with so many digits after the point of a power."""
    if isinstance(value, float):
        return power(value, digits) if value and not 1e-2 <= abs(value) < 1e5 else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def count(value: float) -> str:
    """A whole number, its thousands apart."""
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """A whole number in three figures: 4.88 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{figures(value / (1e3 if unit == 'k' else size))} {unit}"
    return count(value)


def share(part: float, whole: float) -> str:
    """`part` of `whole` in per cent."""
    return f"{100 * part / whole:.3g} %" if whole else "–"


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    if seconds < 60:
        return f"{figures(seconds, 2) if seconds < 10 else f'{seconds:.0f}'} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def memory(megabytes: float) -> str:
    """Megabytes (10**6 bytes), or gigabytes from a thousand."""
    return f"{figures(megabytes / 1000)} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"
