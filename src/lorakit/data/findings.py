"""What a user should know of some rows: how many there are, where the first are, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.data.labelled import LabelledSample
from lorakit.data.masking import TokenizedRow
from lorakit.data.samples import Sample

AnySample = Sample | LabelledSample

SHOWN = 3
"""Places that a finding names."""


@dataclass(frozen=True)
class Finding:
    """Rows that have something in common which their owner may not know of.

    Attributes:
        what: continues "n rows …".
        count, of: so many rows, of so many that were looked at.
        first: the places of the first few, as `file:line`.
        cure: what to do.
    """

    what: str
    count: int
    of: int
    first: tuple[str, ...]
    cure: str

    @property
    def line(self) -> str:
        """The finding as one line."""
        rows = f"{self.count:,} of {self.of:,} rows {'is' if self.count == 1 else 'are'}"
        return f"{rows} {self.what} (first: {self.first[0]}): {self.cure}"


def finding(what: str, rows: Sequence[AnySample | TokenizedRow], of: int, cure: str) -> Finding:
    """A finding about `rows`, of so many."""
    return Finding(what, len(rows), of, tuple(row.where for row in rows[:SHOWN]), cure)
