"""Layers that keep nothing: they see another layer's keys (Gemma 3n), or have no attention."""

from __future__ import annotations

from transformers.cache_utils import DummyLayer

from lorakit.engine.row_layers.place import Place


class NoRows(DummyLayer):
    """A place in the list of layers."""

    place = Place()

    def clear(self, _row: int, _length: int) -> None:
        """There is nothing to clear."""

    def move(self, _source: int, _target: int, _length: int) -> None:
        """There is nothing to move."""
