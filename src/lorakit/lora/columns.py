"""Which columns of packed factors serve which rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Columns(NamedTuple):
    """Neighbouring rows that have the same adapter, and the columns that are its own."""

    first: int
    last: int
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A route in terms of columns.

    Attributes:
        rows: how many rows there are; 1 where all of them have the same adapter.
        groups: (first row, row behind the last, adapter) of neighbours with the same adapter.
        parts: those of the groups whose adapter has columns.
        whole: the only part in which every row has all columns.
        hidden: (rows, columns, 1), which of these a row does not have; None where all rows have
            the same adapter.
    """

    rows: int
    groups: tuple[tuple[int, int, str], ...]
    parts: tuple[Columns, ...]
    whole: tuple[Columns, ...]
    hidden: torch.Tensor | None

    def mixes(self, x: torch.Tensor) -> bool:
        """Whether one product serves all rows of x: those that have a single token each."""
        return self.hidden is not None and x.numel() == self.rows * x.shape[-1]

    def tokens(self, first: int, last: int, count: int) -> slice:
        """Which of `count` tokens, or rows, of a batch are those of its rows first to last."""
        if last - first == self.rows:
            return slice(None)
        each = count // self.rows
        return slice(first * each, last * each)
