"""The errors that a person can act on.

Every failure that lorakit foresees is raised as one of these, with one clear line that names
what is wrong, where, and what to do. The command line prints that line and nothing else.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

_LETTERS_A_SLIP = 4  # a name may have one slip for so many of its letters
_COMPARED = 20  # names letter by letter

BASE_OPTION = "--base, or --model where a verb has that"
"""How a message names the option for the base model; the command line puts its verb's own there."""


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
    """` (did you mean 'r'?)` with the nearest of the first thousand `known`, or nothing where none
    is near."""
    near = nearest(name, known)
    return "" if near is None else f" (did you mean '{near}'?)"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of the first thousand `known` that differs from `name` by slips alone, if any."""
    name = name[:100].lower()
    most = max(1, len(name) // _LETTERS_A_SLIP)
    letters = Counter(name)

    def others(other: str) -> int:
        """Letters that are put in or left out: there are no fewer slips."""
        theirs = Counter(other.lower())
        return max((letters - theirs).total(), (theirs - letters).total())

    close = [k for k in islice(known, 1000) if abs(len(k) - len(name)) <= most]
    close = sorted((k for k in close if others(k) <= most), key=others)[:_COMPARED]
    near = [(slips(name, k.lower()), k) for k in close]
    near = [(n, k) for n, k in near if n <= most and n < max(len(name), len(k))]
    return min(near)[1] if near else None


def slips(one: str, other: str) -> int:
    """How many letters are left out, put in, changed or swapped (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != wanted))
            if last and j > 1 and (letter, one[i - 2]) == (other[j - 2], wanted):
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def listed(names: Iterable[str], limit: int = 12) -> str:
    """`a, b, c` with at most `limit` names, and the number of those left out."""
    all_names = list(names)
    shown = ", ".join(all_names[:limit])
    rest = len(all_names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def each(items: Iterable[In], make: Callable[[In], Out]) -> list[Out]:
    """`make` of every item; the first failure is raised, with the number of the others."""
    made, failures = [], []
    for item in items:
        try:
            made.append(make(item))
        except InputError as error:
            failures.append(error)
    if not failures:
        return made
    if len(failures) == 1:
        raise failures[0]
    others = len(failures) - 1
    raise InputError(f"{failures[0]} (and {count(others, 'more row')})") from failures[0]


def count(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
