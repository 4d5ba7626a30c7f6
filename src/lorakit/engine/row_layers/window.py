"""Keys and values of a layer that sees so many positions: a sliding window, or a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorakit.engine.row_layers.full import FullRows


class WindowRows(FullRows):
    """The newest positions only: a row's position p lies at p modulo the window.

    A chunk (Llama 4) is a window of which the mask hides what lies in the chunk before.
    """

    is_sliding = True

    def __init__(self, rows: int, length: int, window: int) -> None:
        super().__init__(rows, min(length, window))
        # Where it holds all that a row can have, every position has a place of its own.
        self.needs_snapshots = self._overwrites = window < length

    def _seen(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        place, window = self.place, self._length
        if place.prompts:
            for i, length in enumerate(place.prompts):
                self._keep(kept[place.row + i], new[i], length)
            return new
        if place.lengths is None:
            end = place.start + new.shape[2]
            slots = self._slots(place.start - self._before(), place.start, new.device)
            whole = torch.cat([kept[place.rows][:, :, slots], new], 2) if len(slots) else new
            self._keep(kept[place.row], new[0], end)
            return whole
        kept[place.numbers, :, place.lengths % window] = new[:, :, 0]
        return kept[place.rows, :, : min(window, place.longest)]

    def _keep(self, kept: torch.Tensor, new: torch.Tensor, end: int) -> None:
        """Keeps the last of a row's tokens (heads, tokens, d), which end before `end`."""
        fitting = min(self._length, end, new.shape[1])
        kept[:, self._slots(end - fitting, end, new.device)] = new[:, -fitting:]

    def _slots(self, begin: int, end: int, device: torch.device) -> torch.Tensor:
        return torch.arange(begin, end, device=device) % self._length

    def _before(self) -> int:
        """How many positions before the next part of a row its first token sees."""
        return min(self.place.start, self._length - 1)

    def positions(self) -> torch.Tensor:
        assert self.place.lengths is not None
        newest = self.place.lengths[:, None]
        slots = torch.arange(min(self._length, self.place.longest), device=newest.device)
        return newest - (newest - slots) % self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        place = self.place
        if place.lengths is not None:
            return min(self._length, place.longest), 0
        return self._before() + query_length, place.start - self._before()

    def clear(self, row: int, length: int) -> None:
        super().clear(row, min(length, self._length))

    def move(self, source: int, target: int, length: int) -> None:
        super().move(source, target, min(length, self._length))

    def part(self, row: int, begin: int, end: int) -> list[torch.Tensor]:
        return [] if self._overwrites else super().part(row, begin, end)

    def snapshot(self, row: int, length: int) -> list[Any]:
        return super().part(row, 0, min(length, self._length)) if self._overwrites else []

    def put_snapshot(self, row: int, snapshot: Sequence[Any]) -> None:
        self.put_part(row, 0, snapshot)
