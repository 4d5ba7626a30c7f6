"""Whether a model takes rows with pictures in one line. Not believed but tried, on rows of the run.

Some models give a picture's tokens positions of their own (Qwen's in three dimensions), or let them
see each other (Gemma 3), which the boundaries of a line do not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lorakit.data.batches import Collator, LineCollator
from lorakit.data.masking import TokenizedRow, sequences_of
from lorakit.data.picture_rows import has_pictures
from lorakit.models.loaded import base_model, in_evaluation
from lorakit.models.row_attention import rows_apart

if TYPE_CHECKING:
    from torch import nn

    from lorakit.objectives.objective import Collate


def why_padded(model: nn.Module, rows: Sequence[TokenizedRow]) -> str | None:
    """Why rows with pictures are padded; None where they have the same logits in a line.

    Args:
        model: one that takes text in lines, with its adapters.
        rows: of the run; the two shortest with pictures are tried, with the text of one between.
            In half precision rounding may hide what a picture's positions and mask change; these
            are the model's own for each row (`line_pictures`, `row_attention`).
    """
    pictured = [one for one in sequences_of(rows) if has_pictures(one)]
    if not pictured:
        return None
    row, *others = sorted(pictured, key=len)[:2]
    line = [others[0] if others else row, _without_pictures(row), row]
    base: Any = base_model(model)
    name = type(base).__name__
    try:
        with in_evaluation(model):
            together = _logits(model, LineCollator(), line).split([len(one) for one in line])
            pairs = [
                (_logits(model, Collator(0, 1), [one]), z)
                for one, z in zip(line, together, strict=True)
            ][1:]
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        return f"{name} does not take pictures in one line ({reason})"
    if all(_same(alone, behind) for alone, behind in pairs):
        return None
    return f"{name} mixes pictures of rows that lie in one line"


def _without_pictures(row: TokenizedRow) -> TokenizedRow:
    assert row.pictures is not None
    shown = {t for one in row.pictures.placed for t in range(one.begin, one.end)}
    return TokenizedRow([x for t, x in enumerate(row.input_ids) if t not in shown], [], row.where)


def _same(alone: torch.Tensor, behind: torch.Tensor) -> bool:
    """Equal but for rounding: kernels for one row and for several round otherwise."""
    eps = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps)
    return float((alone - behind).abs().max()) <= 16 * eps * float(alone.abs().max())


@torch.no_grad()
def _logits(model: nn.Module, collate: Collate, rows: Sequence[TokenizedRow]) -> torch.Tensor:
    """The logits of all tokens (tokens, V)."""
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {k: x.to(device) for k, x in collate(rows).items() if k != "labels"}
    with rows_apart(inputs, plain=False):
        return model(**inputs, use_cache=False).logits[0]
