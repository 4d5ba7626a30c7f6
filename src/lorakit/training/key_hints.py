"""What to say of a key that a recipe does not have: another tool's name, another section's, or a
slip of the pen. A name that is like none is not guessed at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import lru_cache

from lorakit.training.arguments import ARGUMENTS
from lorakit.training.other_names import instead, plain

_LETTERS_A_SLIP = 5  # a name may differ by one letter for so many of its own


def key_hint(name: str, known: Iterable[str]) -> str:
    """What follows `… is not a recipe key`: `: use data.max_length`, ` (did you mean 'r'?)`, or
    nothing.

    Args:
        name: the last part of the key, without its section.
        known: the keys that the section has.
    """
    if found := instead(name) or _elsewhere(plain(name)):
        return f": {found}"
    near = nearest(name, known)
    return f" (did you mean '{near}'?)" if near else ""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that differs from `name` by slips alone, if there is one."""
    most = max(1, len(name) // _LETTERS_A_SLIP)
    close = [k for k in known if abs(len(k) - len(name)) <= most]
    by_distance = sorted((slips(name[:100].lower(), k), k) for k in close)
    return by_distance[0][1] if by_distance and by_distance[0][0] <= most else None


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


def _elsewhere(name: str) -> str | None:
    """A key of this name in another section of a recipe, or what becomes of it there."""
    for section, keys in _sections().items():
        if name in keys:
            return f"use {section}{name}"
    if argument := ARGUMENTS.get(name):
        if argument.treatment == "honoured":
            return f"use training.{name}"
        return f"{'use' if argument.treatment == 'reserved' else 'leave it out:'} {argument.note}"
    return None


@lru_cache(maxsize=1)
def _sections() -> dict[str, frozenset[str]]:
    """The keys of each section, by what stands before them."""
    from lorakit.lora.config import LoraConfig
    from lorakit.training.recipe import DataRecipe, Recipe, TrainingRecipe

    lora = {f.name for f in dataclasses.fields(LoraConfig)} - {"revision", "inference_mode"}
    return {
        "": frozenset(Recipe.model_fields),
        "training.": frozenset(TrainingRecipe.model_fields),
        "data.": frozenset(DataRecipe.model_fields),
        "lora.": frozenset(lora),
    }
