"""JSON read by the letter: one value a key, and no number that JSON does not have.

Python's `json` keeps the last of two equal keys and takes NaN and infinities; a data file in which
they stand is damaged or means something else, so here they are errors.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

_MakeObject = Callable[[list[tuple[str, Any]]], dict[str, Any]]


def decode(text: str, at: int = 0, decoder: json.JSONDecoder | None = None) -> tuple[Any, int]:
    """The value that starts at `text[at]`, and the index just behind it.

    Raises:
        json.JSONDecodeError: the text is not JSON; its `pos` says where.
        ValueError: it is, and something in it is refused; the message is the reason.
    """
    try:
        return (decoder or _DECODER).raw_decode(text, at)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse(text: str, most_objects: int | None = None) -> Any:
    """The one value that `text` holds.

    Args:
        most_objects: how many objects there may be in it, in all, and how many lists; None for
            any number.

    Raises:
        ValueError: the text is not JSON, or something in it is refused.
    """
    start = len(text) - len(text.lstrip(_SPACE))
    decoder = _DECODER
    if most_objects is not None:
        _check_lists(text, most_objects)
        decoder = _decoder(_counted(most_objects))
    value, end = decode(text, start, decoder)
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


def _counted(most: int) -> _MakeObject:
    """Makes objects until there are too many."""
    numbers = count(1)

    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if next(numbers) > most:
            raise ValueError(f"there are more than {most} objects in it")
        return _unique_keys(pairs)

    return make


def _check_lists(text: str, most: int) -> None:
    """Refuses too many lists before one is made: a million short ones take seconds."""
    if text.count("[") > most and _STRING.sub("", text).count("[") > most:
        raise ValueError(f"there are more than {most} lists in it")


def _decoder(make_object: _MakeObject) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=make_object, parse_constant=_refuse_constant, parse_float=_finite
    )


_SPACE = " \t\r\n"
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)
"""A string of JSON, or one that does not end; no character is read twice."""
_DECODER = _decoder(_unique_keys)
