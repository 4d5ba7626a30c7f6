"""Which rows a forward computes, and where in their tokens it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch


@dataclass
class Place:
    """Where the next forward's keys, values and states go.

    Whole `prompts` (their lengths, padded on the left) of rows from `row` on; or with `starts` the
    rest of them, so many tokens from these positions on; else a part of one row from its position
    `start` on; or one token of each row, behind its `lengths`. `longest` is the most that one of
    the rows has then, where they have tokens before these.
    """

    row: int = 0
    start: int = 0
    prompts: Sequence[int] = ()
    starts: Sequence[int] = ()
    lengths: torch.Tensor | None = None
    longest: int = 0
    _newest: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def rows(self) -> slice:
        """The rows in question."""
        if self.lengths is not None:
            return slice(0, len(self.lengths))
        return slice(self.row, self.row + max(1, len(self.prompts)))

    @cached_property
    def numbers(self) -> torch.Tensor:
        """The rows in question as an index beside `lengths`."""
        assert self.lengths is not None
        return torch.arange(len(self.lengths), device=self.lengths.device)

    def newest(self, heads: int, length: int) -> torch.Tensor:
        """Where the newest token of each row goes, among the positions of all rows and heads.

        Args:
            length: of the positions that a head has.

        Returns: (rows * heads,), the same for all layers of such a shape.
        """
        if (heads, length) not in self._newest:
            assert self.lengths is not None
            head = torch.arange(heads, device=self.lengths.device)
            at = (self.numbers[:, None] * heads + head) * length + self.lengths[:, None]
            self._newest[heads, length] = at.flatten()
        return self._newest[heads, length]

    @property
    def continues(self) -> bool:
        """Whether the rows have tokens before these."""
        return self.lengths is not None or self.start > 0 or bool(self.starts)
