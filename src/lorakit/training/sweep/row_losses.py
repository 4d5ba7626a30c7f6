"""What each held-out row costs: summed nats and supervised tokens, by the loss of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lorakit.data.batches import Collator, LabelCollator
from lorakit.data.masking import TokenizedRow

if TYPE_CHECKING:
    from torch import nn

    from lorakit.training.tasks import Beginning, Loss

RowLosses = dict[str, list[tuple[float, int]]]


def losses_of(
    model: nn.Module, begun: Beginning, splits: Mapping[str, Sequence[TokenizedRow]]
) -> RowLosses:
    """The losses of the rows of each split, by the model as it is now, with its active adapters."""
    pad = begun.tokenizer.pad_token_id
    collate = begun.collator or Collator(pad if isinstance(pad, int) else 0, 1)
    loss = begun.loss(model, False)
    return {name: row_losses(model, rows, collate, loss) for name, rows in splits.items()}


@torch.no_grad()
def row_losses(
    model: nn.Module,
    rows: Sequence[TokenizedRow],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]] | Collator | LabelCollator,
    loss: Loss,
) -> list[tuple[float, int]]:
    """For each row its summed nats and its labels; a row at a time, so that none rounds another."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = []
    try:
        for row in rows:
            batch = {name: tensor.to(device) for name, tensor in collate([row]).items()}
            total, count = loss(model, batch)
            found.append((float(total), int(count)))
    finally:
        model.train(was_training)
    return found
