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
from lorakit.models.loaded import base_model
from lorakit.models.row_attention import rows_apart

if TYPE_CHECKING:
    from torch import nn

    from lorakit.objectives.objective import Collate


def why_padded(model: nn.Module, rows: Sequence[TokenizedRow]) -> str | None:
    """Why rows with pictures are padded; None where they have the same logits in a line.

    Args:
        model: one that takes text in lines, with its adapters.
        rows: of the run; the two shortest with pictures are tried. In half precision rounding
            may be as large as what a picture's positions and mask change, so that models which
            are told of pictures' tokens are not tried.
    """
    pictured = [one for one in sequences_of(rows) if has_pictures(one)]
    if not pictured:
        return None
    row, *others = sorted(pictured, key=len)[:2]
    before = others[0] if others else row
    base: Any = base_model(model)
    name = type(base).__name__
    assert row.pictures is not None
    if base.dtype.itemsize < 4 and row.pictures.reader.kinds(row.input_ids):
        kind = str(base.dtype).removeprefix("torch.")
        return (
            f"{name} is told which tokens are of pictures, and {kind} is too coarse to show "
            "whether rows in one line stay apart"
        )
    was_training = model.training
    model.eval()
    try:
        alone = _logits(model, Collator(0, 1), [row])
        behind = _logits(model, LineCollator(), [before, row])[len(before) :]
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        return f"{name} does not take pictures in one line ({reason})"
    finally:
        model.train(was_training)
    # Kernels for one row and for several round otherwise.
    eps = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps)
    if float((alone - behind).abs().max()) <= 16 * eps * float(alone.abs().max()):
        return None
    return f"{name} mixes pictures of rows that lie in one line"


@torch.no_grad()
def _logits(model: nn.Module, collate: Collate, rows: Sequence[TokenizedRow]) -> torch.Tensor:
    """The logits of all tokens (tokens, V)."""
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {k: x.to(device) for k, x in collate(rows).items() if k != "labels"}
    if "cu_seq_lens_q" not in inputs:
        return model(**inputs, use_cache=False).logits[0]
    with rows_apart(plain=False):
        return model(**inputs, use_cache=False).logits[0]
