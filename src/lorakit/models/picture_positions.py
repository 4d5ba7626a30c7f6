"""Where the tokens of a row with pictures stand, in models whose positions have three dimensions.

A token has a position in time, height and width each (M-RoPE, Wang et al. 2024, arXiv:2409.12191);
text behind a picture goes on behind the largest of them. The model's own `get_rope_index` says
which, and is asked here of one row at a time, without the model's weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class PicturePositions:
    """What a model's `get_rope_index` says of a row.

    Args:
        model: the one that has it, with any weights.

    Attributes:
        grids: the name of the tensor (pictures, 3) that tells the sizes of pictures, in patches.
    """

    grids = "image_grid_thw"

    def __init__(self, model: Any) -> None:
        kind = type(model)
        self._model: Any = object.__new__(kind)  # the method alone, so that no weights are kept
        nn.Module.__init__(self._model)
        self._model.config = model.config

    def of_row(
        self, input_ids: Sequence[int], kinds: Sequence[int], grids: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        """The positions of a row's tokens (4, tokens), int64, and how far text behind is moved.

        The first of four is the token's number, which tells rows in one line apart; then come time,
        height and width. A token that is generated behind the row has its number plus what it is
        moved in all three.

        Args:
            kinds: of each token, 0 for text and 1 for a picture.
            grids: of the row's pictures, (pictures, 3).
        """
        ids = torch.tensor([[*input_ids]])
        positions, moved = self._model.get_rope_index(
            ids, mm_token_type_ids=torch.tensor([[*kinds]]), **{self.grids: grids.cpu()}
        )
        numbers = torch.arange(ids.shape[1])[None]
        return torch.cat([numbers, positions[:, 0]]), int(moved)


def picture_positions(model: Any) -> PicturePositions | None:
    """How rows of a model are placed; None where positions have one dimension, or other forms.

    Args:
        model: with a head or without.
    """
    inner = getattr(model, "base_model", model)
    own = getattr(inner, "get_rope_index", None)
    needed = {"mm_token_type_ids", PicturePositions.grids}
    if own is None or not needed <= inspect.signature(own).parameters.keys():
        return None
    found = PicturePositions(inner)
    side = getattr(inner.config.vision_config, "spatial_merge_size", 2)
    try:  # a picture of one token between two others
        positions, moved = found.of_row([0, 0, 0], [0, 1, 0], torch.tensor([[1, side, side]]))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError):
        return None
    return found if positions.shape == (4, 3) and not moved else None
