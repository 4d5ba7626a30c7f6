"""Rows with pictures computed by `generate` beside rows of text that join and leave freely.

For models that tell a picture's tokens from others in their attention or positions (Gemma 3, Qwen's
positions in three dimensions), which a cache of ours does not know.
"""

from __future__ import annotations

import inspect
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
        text, pictures: for rows without pictures, and for those with some.
        most: how many rows there may be in both.
    """

    def __init__(self, text: Batch, pictures: Batch, most: int) -> None:
        self._text, self._pictures, self._most = text, pictures, most

    @property
    def rows(self) -> list[AnswerRow]:
        """Those of both."""
        return [*self._text.rows, *self._pictures.rows]

    def has_room(self) -> bool:
        return len(self.rows) < self._most

    def add(self, row: AnswerRow) -> None:
        (self._text if row.pictures is None else self._pictures).add(row)

    def step(self) -> None:
        for batch in (self._text, self._pictures):
            if batch.rows:
                batch.step()
