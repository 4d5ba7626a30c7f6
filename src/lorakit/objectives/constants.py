"""Values of rows that training does not change, such as what a reference gives: computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lorakit.data.masking import TokenizedRow

PREFIX = "sequence."
"""Begins the names of a batch's tensors that have a value for each sequence."""


class RowConstants:
    """Values of rows by name, one for each of a row's sequences."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[TokenizedRow, dict[str, torch.Tensor]]] = {}

    def add(self, rows: Sequence[TokenizedRow], values: Mapping[str, torch.Tensor]) -> None:
        """Keeps the values (sequences of all rows,) of each name."""
        sizes = [len(row.sequences) for row in rows]
        parts = {name: tensor.split(sizes) for name, tensor in values.items()}
        for i, row in enumerate(rows):  # the row is kept too, so that no other has its id
            self._found[id(row)] = row, {name: several[i] for name, several in parts.items()}

    def of(self, rows: Sequence[TokenizedRow]) -> dict[str, torch.Tensor]:
        """Tensors of a batch of these rows; none where the values of a row are not known."""
        import torch

        found = [self._found[id(row)][1] for row in rows if id(row) in self._found]
        if len(found) < len(rows) or not rows:
            return {}
        return {PREFIX + name: torch.cat([own[name] for own in found]) for name in found[0]}
