"""Rows with pictures beside rows of text, where a model tells the tokens of pictures from others.

Their attention (Gemma 3, whose pictures see themselves whole) or their positions (Qwen's, in three
dimensions) are other ones. Whether our cache carries such a model is tried with the first prompt
that has pictures; where it does not, `generate` computes these rows apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lorakit.models.loaded import base_model

if TYPE_CHECKING:
    from lorakit.engine.batch import Batch
    from lorakit.engine.rows import AnswerRow


def tells_pictures_apart(model: Any) -> bool:
    """Whether the model is told which tokens are of pictures."""
    parameters = inspect.signature(base_model(model).forward).parameters
    reads = hasattr(base_model(model), "get_image_features")
    return reads and not parameters.keys().isdisjoint(("token_type_ids", "mm_token_type_ids"))


class PicturesApart:
    """Two batches as one.

    Args:
        carried, apart: for all rows that can be carried, and for the others.
        most: how many rows there may be in both.
        carries: whether rows with pictures are carried, tried with one of them.
    """

    def __init__(
        self, carried: Batch, apart: Batch, most: int, carries: Callable[[AnswerRow], bool]
    ) -> None:
        self._carried, self._apart, self._most = carried, apart, most
        self._try = carries
        self._carries: bool | None = None

    @property
    def rows(self) -> list[AnswerRow]:
        """Those of both."""
        return [*self._carried.rows, *self._apart.rows]

    def has_room(self) -> bool:
        return len(self.rows) < self._most

    def add(self, row: AnswerRow) -> None:
        if row.pictures is not None and self._carries is None:
            self._carries = self._try(row)
        goes_along = row.pictures is None or self._carries
        (self._carried if goes_along else self._apart).add(row)

    def step(self) -> None:
        for batch in (self._carried, self._apart):
            if batch.rows:
                batch.step()
