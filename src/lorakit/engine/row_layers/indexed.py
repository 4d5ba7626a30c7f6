"""Keys and values with the keys of an indexer, which picks the positions seen (DeepSeek V3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorakit.engine.row_layers.full import FullRows


class IndexedRows(FullRows):
    """As `FullRows`, with the indexer's keys (rows, length, d) beside them."""

    indexer_keys: torch.Tensor | None = None
    indexer_position_ids: torch.Tensor | None = None

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Keeps the indexer's keys (rows, tokens, d), and returns all that the rows have."""
        new = indexer_key_states[:, None]
        if self.indexer_keys is None:
            self.indexer_keys = self._room(new)
        return self._seen(self.indexer_keys, new)[:, 0]

    def _make_like(self, part: Sequence[torch.Tensor]) -> None:
        super()._make_like(part)
        if len(part) > 2 and self.indexer_keys is None:
            self.indexer_keys = self._room(part[2][None])

    def kept(self) -> list[torch.Tensor]:
        own = self.indexer_keys
        return super().kept() + ([] if own is None else [own])
