"""The held-out rows of a sweep in two: those that choose, and those that are reported on.

Rows with the same prompt are on one side, so that what is reported was not chosen by.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.data.findings import AnySample
from lorakit.data.masking import TokenizedRow
from lorakit.errors import InputError

SELECTION, REPORT = "selection", "report"

FEWEST = 8  # held-out prompts of a split: a bootstrap of fewer says nothing


@dataclass(frozen=True)
class Split:
    """Held-out rows with their samples; `units[i]` numbers the prompt of row i."""

    rows: list[TokenizedRow]
    samples: list[AnySample]
    units: list[int]

    @property
    def prompts(self) -> int:
        """How many different prompts there are."""
        return max(self.units, default=-1) + 1


def split(
    rows: Sequence[TokenizedRow], samples: Sequence[AnySample], share: float, seed: int
) -> dict[str, Split]:
    """Held-out rows as `selection` (about `share` of the prompts) and `report`.

    Raises:
        InputError: a side would have fewer than `FEWEST` prompts.
    """
    whole = whole_split(rows, samples)
    order = list(range(whole.prompts))
    random.Random(seed).shuffle(order)
    chosen = set(order[: round(share * len(order))])
    if min(len(chosen), len(order) - len(chosen)) < FEWEST:
        raise InputError(
            f"data.eval: {len(rows)} rows with {len(order)} prompts are too few to tell settings "
            f"apart: a sweep chooses by some of them and reports on the others, at least {FEWEST} "
            f"prompts each; hold out {2 * FEWEST} or more"
        )
    sides = {
        name: [i for i, unit in enumerate(whole.units) if (unit in chosen) == (name == SELECTION)]
        for name in (SELECTION, REPORT)
    }
    return {
        name: whole_split([rows[i] for i in own], [samples[i] for i in own])
        for name, own in sides.items()
    }


def whole_split(rows: Sequence[TokenizedRow], samples: Sequence[AnySample]) -> Split:
    """All of these rows as one split."""
    numbers: dict[str, int] = {}
    units = [numbers.setdefault(sample.prompt_key, len(numbers)) for sample in samples]
    return Split([*rows], [*samples], units)
