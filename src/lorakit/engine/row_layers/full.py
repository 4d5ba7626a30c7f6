"""Keys and values of a layer that sees all positions before it (also MLA's compressed ones)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from mmap import ACCESS_COPY, mmap
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from lorakit.engine.row_layers.place import Place


class FullRows(CacheLayerMixin):
    """Keys and values (rows, heads, length, d): a row's position p lies at p."""

    is_sliding = False
    needs_snapshots = False
    """Whether it keeps something that is not in `part`."""

    def __init__(self, rows: int, length: int) -> None:
        super().__init__()
        self.place = Place()
        self._rows, self._length = rows, length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes memory. It must not hold values that are not finite, even where a mask hides it."""
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps these, and returns all that the rows in question see: (rows, heads, seen, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self._seen(self.keys, key_states), self._seen(self.values, value_states)

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        shape = self._rows, like.shape[1], self._length, like.shape[3]
        if like.device.type != "cpu":
            return like.new_zeros(shape)
        # Zeros that the system gives page by page when rows come to fill them. Those of malloc may
        # be memory that was used before, which is then filled with zeros as a whole.
        size = math.prod(shape) * like.dtype.itemsize
        zeros = mmap(-1, size, access=ACCESS_COPY)  # private, and of no file
        return torch.frombuffer(zeros, dtype=like.dtype).view(shape)

    def _seen(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Keeps `new` (rows, heads, tokens, d), and returns it behind what the rows had."""
        place = self.place
        if place.starts:
            for i, (start, count) in enumerate(zip(place.starts, place.prompts, strict=True)):
                kept[place.row + i, :, start : start + count] = new[i, :, -count:]
            return kept[place.rows, :, : place.longest]
        if place.prompts:
            for i, length in enumerate(place.prompts):
                kept[place.row + i, :, :length] = new[i, :, -length:]
            return new
        if place.lengths is None:
            end = place.start + new.shape[2]
            kept[place.rows, :, place.start : end] = new
            return kept[place.rows, :, :end]
        kept[place.numbers, :, place.lengths] = new[:, :, 0]
        return kept[place.rows, :, : place.longest]

    def take_newest(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `update`, for one token of each row (`Place.lengths`): (rows, heads, d) each."""
        if not self.is_initialized or keys.shape[2] != values.shape[2]:
            return self.update(keys[:, :, None], values[:, :, None])
        assert self.keys is not None
        assert self.values is not None
        place, (rows, heads, d) = self.place, keys.shape
        at = place.newest(heads, self._length)
        self.keys.view(-1, d).index_copy_(0, at, keys.reshape(rows * heads, d))
        self.values.view(-1, d).index_copy_(0, at, values.reshape(rows * heads, d))
        return self.keys[:rows, :, : place.longest], self.values[:rows, :, : place.longest]

    def positions(self) -> torch.Tensor:
        """The position of each key that `update` returns for newest tokens: (rows or 1, seen).

        One that a row has not reached is above its own position, or negative.
        """
        assert self.place.lengths is not None
        return torch.arange(self.place.longest, device=self.place.lengths.device)[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` will return, and the position of the first."""
        place = self.place
        return (place.start + query_length if place.lengths is None else place.longest), 0

    def get_seq_length(self) -> int:
        """The positions before the next forward's."""
        place = self.place
        return place.start if place.lengths is None else place.longest - 1

    def get_max_length(self) -> int:
        """How long a row can become."""
        return self._length

    def kept(self) -> list[torch.Tensor]:
        """The tensors in which rows have places, (rows, heads, positions, d)."""
        return [tensor for tensor in (self.keys, self.values) if tensor is not None]

    def clear(self, row: int, length: int) -> None:
        """Puts zeros in a row's place, which has `length` positions."""
        for tensor in self.kept():
            tensor[row, :, :length] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a row of `length` positions into the place of another."""
        for tensor in self.kept():
            tensor[target, :, :length] = tensor[source, :, :length]

    def part(self, row: int, begin: int, end: int) -> list[torch.Tensor]:
        """Copies of what a row has of the positions [begin, end), (heads, positions, d) each."""
        return [tensor[row, :, begin:end].clone() for tensor in self.kept()]

    def put_part(self, row: int, begin: int, part: Sequence[torch.Tensor]) -> None:
        """Gives a row such copies, from its position `begin` on."""
        if not part:
            return
        self._make_like(part)
        for kept, own in zip(self.kept(), part, strict=True):
            kept[row, :, begin : begin + own.shape[1]] = own

    def _make_like(self, part: Sequence[torch.Tensor]) -> None:
        """Takes memory for such tensors if there is none yet."""
        if not self.is_initialized:
            self.lazy_initialization(part[0][None], part[1][None])

    def snapshot(self, _row: int, _length: int) -> list[Any]:
        """Copies of what a row of `length` positions has that is not in `part`."""
        return []

    def put_snapshot(self, row: int, snapshot: Sequence[Any]) -> None:
        """Gives a row such copies."""
