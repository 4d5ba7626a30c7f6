"""The keys and values of all rows, in one place that is made once.

A row has a place of its own in tensors of (rows, heads, length, d). Rows in use are the first ones,
without gaps, so that a step of all of them reads views and copies nothing. A forward is prepared by
one of three methods (whole prompts, a part of a row, newest tokens), which give the model's
arguments; its attention then calls `update`, of transformers' cache interface.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Place:
    """Where the next forward's keys and values go.

    Whole `prompts` (their lengths, padded on the left) of rows from `row` on; else a part of one
    row from its position `start` on; or one token of each row, behind its `lengths`.
    """

    row: int = 0
    start: int = 0
    prompts: Sequence[int] = ()
    lengths: torch.Tensor | None = None
    longest: int = 0


class RowCache(Cache):
    """Keys and values of at most `rows` rows of at most `length` tokens."""

    def __init__(self, layers: int, rows: int, length: int) -> None:
        super().__init__(layers=[_RowLayer(rows, length) for _ in range(layers)])

    def whole_prompts(
        self, first: int, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> dict[str, Any]:
        """The model's arguments for prompts of rows from `first` on, padded on the left."""
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        # Padding is the prompt's own token: nothing that the model would not compute anyway.
        ids = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        columns = torch.arange(width, device=device)
        begins = width - torch.tensor(lengths, device=device)[:, None]
        mask = None  # attention is causal then, from the first key on
        if len(prompts) > 1:
            real = columns >= begins
            # Padding sees padding, as what sees nothing is NaN.
            alike = real[:, None] == real[:, :, None]
            mask = (alike & (columns <= columns[:, None]))[:, None]
        positions = (columns - begins).clamp_(min=0)
        return self._arguments(_Place(first, prompts=lengths), ids, positions, mask)

    def part_of_row(
        self, row: int, tokens: Sequence[int], start: int, device: torch.device
    ) -> dict[str, Any]:
        """The model's arguments for a row's tokens from its position `start` on."""
        end = start + len(tokens)
        positions = torch.arange(start, end, device=device)
        before = torch.arange(end, device=device)
        mask = (before <= positions[:, None])[None, None] if start else None
        return self._arguments(_Place(row, start), [tokens], positions[None], mask)

    def newest_tokens(
        self, tokens: Sequence[int], lengths: Sequence[int], device: torch.device
    ) -> dict[str, Any]:
        """The model's arguments for one token of each row, which have these lengths before it."""
        before = torch.tensor(lengths, device=device)
        longest = max(lengths) + 1
        # Also where it hides nothing: with a mask a CPU takes the quicker of two ways.
        mask = (torch.arange(longest, device=device) <= before[:, None])[:, None, None]
        place = _Place(lengths=before, longest=longest)
        return self._arguments(place, [[token] for token in tokens], before[:, None], mask)

    def _arguments(
        self,
        place: _Place,
        ids: Sequence[Sequence[int]],
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Tokens, positions, and a mask (rows, 1, queries, keys) of what each token sees."""
        for layer in self.layers:
            layer.place = place
        return {
            "input_ids": torch.tensor(ids, device=positions.device),
            "position_ids": positions,
            "attention_mask": mask,
            "past_key_values": self,
            "use_cache": True,
        }

    def clear(self, row: int, length: int) -> None:
        """Puts zeros in the first `length` positions of a row's place.

        NaN or Inf there would reach whoever gets the place next, through any mask.
        """
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                if tensor is not None:
                    tensor[row, :, :length] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Puts the first `length` positions of a row into the place of another."""
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                if tensor is not None:
                    tensor[target, :, :length] = tensor[source, :, :length]


class _RowLayer(CacheLayerMixin):
    """One layer's part of a `RowCache`."""

    is_sliding = False

    def __init__(self, rows: int, length: int) -> None:
        super().__init__()
        self.place = _Place()
        self._rows, self._length = rows, length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes memory. It must not hold values that are not finite, even where a mask hides it."""

        def room(like: torch.Tensor) -> torch.Tensor:
            shape = self._rows, like.shape[1], self._length, like.shape[3]
            if like.device.type != "cpu":
                return like.new_zeros(shape)
            # NumPy's zeros are pages that the system gives when rows come to fill them.
            zeros = np.zeros(math.prod(shape) * like.dtype.itemsize, np.uint8)
            return torch.from_numpy(zeros).view(like.dtype).view(shape)

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps these, and returns all that the rows in question have: (rows, heads, length, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        place = self.place
        if place.prompts:
            for i, length in enumerate(place.prompts):
                self.keys[place.row + i, :, :length] = key_states[i, :, -length:]
                self.values[place.row + i, :, :length] = value_states[i, :, -length:]
            return key_states, value_states
        if place.lengths is None:
            one, end = slice(place.row, place.row + 1), place.start + key_states.shape[2]
            self.keys[one, :, place.start : end] = key_states
            self.values[one, :, place.start : end] = value_states
            return self.keys[one, :, :end], self.values[one, :, :end]
        rows = torch.arange(len(place.lengths), device=key_states.device)
        self.keys[rows, :, place.lengths] = key_states[:, :, 0]
        self.values[rows, :, place.lengths] = value_states[:, :, 0]
        used = slice(0, len(rows)), slice(None), slice(0, place.longest)
        return self.keys[used], self.values[used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and offset of what `update` will return."""
        place = self.place
        return (place.start + query_length if place.lengths is None else place.longest), 0

    def get_seq_length(self) -> int:
        """The positions before the next forward's."""
        place = self.place
        return place.start if place.lengths is None else place.longest - 1

    def get_max_length(self) -> int:
        """How long a row can become."""
        return self._length
