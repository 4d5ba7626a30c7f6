"""The errors that a person can act on.

Every failure that lorakit foresees is raised as one of these, with one clear line that names
what is wrong, where, and what to do. The command line prints that line and nothing else.
"""

import difflib
from collections.abc import Iterable
from itertools import islice


class LorakitError(Exception):
    """Something failed while running (a full disk, a merge that does not verify)."""

    exit_code = 1

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


class InputError(LorakitError, ValueError):
    """What the user gave cannot be used (a recipe, a data file, an adapter, a flag).

    It is a `ValueError` too, which is what callers of PEFT's functions expect to catch.
    """

    exit_code = 2


def one_line(text: str) -> str:
    """`text` on one line, with escapes for what would act on a terminal or cannot be printed."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or else what it is called."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'r'?)` with the nearest of the first thousand `known`, or nothing."""
    close = difflib.get_close_matches(name[:100], list(islice(known, 1000)), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def listed(names: Iterable[str], limit: int = 12) -> str:
    """`a, b, c` with at most `limit` names, and the number of those left out."""
    all_names = list(names)
    shown = ", ".join(all_names[:limit])
    rest = len(all_names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
