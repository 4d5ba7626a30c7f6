"""What a reward function returned, as numbers: one rule for each kind of value.

None means that the function does not apply. Numbers of Python, numpy and torch count as they are,
True as 1 and False as 0. NaN, Inf, texts and everything else are failures of their completion, and
what is not one value a completion is a failure of the call.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any


class RewardFailedError(Exception):
    """A call of a reward function gave no rewards; why is in the message."""


def read_rewards(returned: Any, expected: int) -> tuple[list[float | None], dict[int, str]]:
    """The values, and by its number why a completion has none where that is a failure.

    Raises:
        RewardFailedError: they are not one for each of the `expected` completions.
    """
    if hasattr(returned, "tolist"):  # an array, a tensor
        returned = returned.tolist()
    if returned is None:
        raise RewardFailedError("it returned None: return a list with a number a completion")
    if isinstance(returned, (str, bytes, Mapping)) or not isinstance(returned, Iterable):
        raise RewardFailedError(
            f"it returned {_shown(returned)}: return a list with a number a completion"
        )
    values = list(returned)
    if len(values) != expected:
        raise RewardFailedError(
            f"it returned {len(values)} rewards for {expected} completions: return one for each, "
            "and None where it does not apply"
        )
    read: list[float | None] = []
    causes: dict[int, str] = {}
    for i, value in enumerate(values):
        number, cause = _number(value)
        read.append(number)
        if cause:
            causes[i] = cause
    return read, causes


def _number(value: Any) -> tuple[float | None, str]:
    """A value as a number, or why it is none."""
    if value is None:
        return None, ""
    whole = hasattr(value, "tolist") and getattr(value, "shape", None) in ((), (1,))
    if whole or (hasattr(value, "item") and not hasattr(value, "tolist")):
        value = value.item()
    if not isinstance(value, numbers.Real) and not _is_decimal(value):
        return None, f"it gave {_shown(value)} where a number belongs"
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer past all floats
        number = math.inf
    if math.isnan(number):
        return None, "it gave NaN: give None where it does not apply"
    if math.isinf(number):
        return None, f"it gave {'-' if number < 0 else ''}Inf, which no mean can have"
    return number, ""


def _is_decimal(value: Any) -> bool:
    from decimal import Decimal

    return isinstance(value, Decimal)


def _shown(value: Any) -> str:
    kind = type(value).__name__
    article = "an" if kind[0] in "aeiou" else "a"
    text = repr(value)
    return f"{article} {kind} ({text[:40]}{'…' if len(text) > 40 else ''})"
