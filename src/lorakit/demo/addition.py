"""Sums of two numbers with two digits each, made from a seed, worked out column by column.

A short supervised fine-tuning teaches the form of the columns; whether the last number is right can
be checked by anyone, which is what reinforcement learning needs. A small model gets a sum right
only where it writes the columns down first, as on a scratchpad (Nye et al. 2021, arXiv:2112.00114).
"""

import random
from typing import Any

from lorakit.errors import InputError

SYSTEM = "Add, ones first."

MARK = "####"
"""Before the final number, as in GSM8K (Cobbe et al. 2021, arXiv:2110.14168)."""

_SUMS = 90 * 90


def make_sums(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` different sums in the `messages` format.

    Raises:
        InputError: `count` is not within 1 and the number of different sums.
    """
    if not 1 <= count <= _SUMS:
        raise InputError(f"{count} sums cannot be made: ask for 1 to {_SUMS}")
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return [_row(a, b) for a, b in random.Random(seed).sample(pairs, count)]


def _row(a: int, b: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{a}+{b}"},
            {"role": "assistant", "content": _worked(a, b)},
        ]
    }


def _worked(a: int, b: int) -> str:
    """The ones with their sum, the tens with the carry and theirs, and the result.

    >>> _worked(47, 38)
    '7+8=15, 4+3+1=8 #### 85'
    """
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    columns = f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}+{ones // 10}={tens}"
    return f"{columns} {MARK} {a + b}"
