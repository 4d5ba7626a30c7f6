"""Sums of two numbers with two digits each, made from a seed, with a way to work them out.

The way is what a short supervised fine-tuning teaches the form of; whether the last line is right
can be checked by anyone, which is what reinforcement learning needs.
"""

import random
from typing import Any

from lorakit.errors import InputError

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
            {"role": "user", "content": f"{a} + {b} = ?"},
            {"role": "assistant", "content": f"{MARK} {a + b}"},
        ]
    }
