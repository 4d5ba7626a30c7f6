"""The few cases of a matrix that every change runs; `make test-all` runs the others too."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def few(cases: Mapping[str, Any] | Iterable[Any], *chosen: Any) -> list[Any]:
    """All `cases` for `pytest.mark.parametrize`, those beside `chosen` marked exhaustive.

    Of a mapping, the keys are the names of the cases. A tuple is the values of several arguments.

    Raises:
        ValueError: if something chosen is no case.
    """
    named = isinstance(cases, Mapping)
    pairs = [(case, cases[case] if named else case) for case in cases]  # type: ignore[index]
    if missing := [name for name in chosen if name not in [pair[0] for pair in pairs]]:
        raise ValueError(f"no such cases: {missing}")
    return [
        pytest.param(
            *(values if isinstance(values, tuple) else (values,)),
            id=name if named else None,
            marks=() if name in chosen else pytest.mark.exhaustive,
        )
        for name, values in pairs
    ]
