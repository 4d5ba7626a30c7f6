"""JSON read by the letter: one value a key, and no number that JSON does not have.

Python's `json` keeps the last of two equal keys and takes NaN and infinities; a data file in which
they stand is damaged or means something else, so here they are errors.
"""

import json
import math
from collections import Counter
from typing import Any


def decode(text: str, at: int = 0) -> tuple[Any, int]:
    """The value that starts at `text[at]`, and the index just behind it.

    Raises:
        json.JSONDecodeError: the text is not JSON; its `pos` says where.
        ValueError: it is, and something in it is refused; the message is the reason.
    """
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse(text: str) -> Any:
    """The one value that `text` holds.

    Raises:
        ValueError: the text is not JSON, or something in it is refused.
    """
    start = len(text) - len(text.lstrip(_SPACE))
    value, end = decode(text, start)
    if text[end:].strip(_SPACE):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        times = Counter(name for name, _ in pairs)
        twice = next(name for name, count in times.items() if count > 1)
        raise ValueError(f"the key '{twice}' occurs twice in one object")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON (write null or a number)")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return number


_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite
)
