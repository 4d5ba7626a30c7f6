"""Layers that keep nothing: they see another layer's keys (Gemma 3n), or have no attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DummyLayer

from lorakit.engine.row_layers.place import Place


class NoRows(DummyLayer):
    """A place in the list of layers."""

    place = Place()
    needs_snapshots = False

    def clear(self, _row: int, _length: int) -> None:
        """There is nothing to clear."""

    def move(self, _source: int, _target: int, _length: int) -> None:
        """There is nothing to move."""

    def part(self, _row: int, _begin: int, _end: int) -> list[torch.Tensor]:
        """There is nothing to copy."""
        return []

    def put_part(self, _row: int, _begin: int, _part: Sequence[torch.Tensor]) -> None:
        """There is nothing to put."""

    def snapshot(self, _row: int, _length: int) -> list[Any]:
        """There is nothing to copy."""
        return []

    def put_snapshot(self, _row: int, _snapshot: Sequence[Any]) -> None:
        """There is nothing to put."""
