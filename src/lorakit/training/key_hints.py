"""What to say of a key that a recipe does not have: another tool's name, another section's, or a
slip of the pen. A name that is like none is not guessed at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import lru_cache

from lorakit.errors import did_you_mean
from lorakit.training.arguments import ARGUMENTS
from lorakit.training.other_names import instead, plain


def key_hint(name: str, known: Iterable[str]) -> str:
    """What follows `… is not a recipe key`: `: use data.max_length`, ` (did you mean 'r'?)`, or
    nothing.

    Args:
        name: the last part of the key, without its section.
        known: the keys that the section has.
    """
    if found := instead(name) or _elsewhere(plain(name)):
        return f": {found}"
    return did_you_mean(name, known)


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
