"""The held-out loss of several adapters, row by row, out of batches that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lorakit.data.masking import TokenizedRow
from lorakit.lora.model import LoraModel
from lorakit.lora.routing import BASE, Route
from lorakit.models.loss import SupervisedLoss
from lorakit.training.together.batch import Batch, Part, losses_of

RowLosses = list[tuple[float, int]]
"""Of each row: summed nats, supervised tokens."""


@torch.no_grad()
def row_losses(
    model: LoraModel,
    loss: SupervisedLoss,
    names: Sequence[str],
    rows: Sequence[TokenizedRow],
    collate: Callable[[list[TokenizedRow]], Batch],
    pad_token_id: int,
    batch_size: int,
) -> list[RowLosses]:
    """The losses of all `rows` with each adapter, in the order of both.

    Args:
        names: the adapters, and `BASE` for the bare base.
        batch_size: rows at a time, each of which is computed for every adapter.
    """
    device = next(model.parameters()).device
    found: list[RowLosses] = [[(0.0, 0)] * len(rows) for _ in names]
    # Rows of like length together, so that little is padded; the longest first, so that memory
    # that is enough for them is enough.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    was_training = model.training
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
            counts = [rows[i].supervised for i in chosen]
            losses_by_name = _losses(model, loss, names, batch, pad_token_id)
            for own, losses in zip(found, losses_by_name, strict=True):
                for i, count, part in zip(chosen, counts, losses.split(counts), strict=True):
                    own[i] = (part.double().sum().item(), count)
    finally:
        model.train(was_training)
    return found


def _losses(
    model: LoraModel,
    loss: SupervisedLoss,
    names: Sequence[str],
    batch: Batch,
    pad_token_id: int,
) -> list[torch.Tensor]:
    """The losses of the batch's supervised tokens with each adapter, on the CPU."""
    if len(names) > 1:
        parts = [Part(name, batch) for name in names]
        return [own.cpu() for own in losses_of(model, loss, parts, pad_token_id)]
    [name] = names
    with model.routing.using(Route(shared=() if name == BASE else (name,))):
        return [loss.of_tokens(model, batch).cpu()]
