"""The held-out loss of several adapters, row by row, out of batches that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lorakit.data.grouping import AT_ONCE
from lorakit.data.masking import TokenizedRow
from lorakit.lora.model import LoraModel
from lorakit.lora.routing import BASE, Route
from lorakit.models.loss import SupervisedLoss
from lorakit.progress import track
from lorakit.sweeps.together.batch import Batch, Part, losses_of
from lorakit.training.batching import Batching

RowLosses = list[tuple[float, int]]
"""Of each row: summed nats, supervised tokens."""


def row_losses(
    model: LoraModel,
    loss: SupervisedLoss,
    names: Sequence[str],
    rows: Sequence[TokenizedRow],
    batching: Batching,
    pad_token_id: int,
) -> list[RowLosses]:
    """The losses of all `rows` with each adapter, in the order of both.

    Args:
        names: the adapters, and `BASE` for the bare base. As many of them share a pass as do not
            make it larger than it is to be.
    """

    def of_each(batch: Batch) -> list[torch.Tensor]:
        several = max(1, AT_ONCE // batch["input_ids"].numel())
        return [
            losses
            for at in range(0, len(names), several)
            for losses in _losses(model, loss, names[at : at + several], batch, pad_token_id)
        ]

    return in_batches(model, rows, batching, of_each, len(names))


@torch.no_grad()
def in_batches(
    model: nn.Module,
    rows: Sequence[TokenizedRow],
    batching: Batching,
    losses_of: Callable[[Batch], list[torch.Tensor]],
    count: int = 1,
) -> list[RowLosses]:
    """The losses of all `rows`, in their order, so many times as `losses_of` takes them.

    Args:
        losses_of: the losses of a batch's supervised tokens, row after row, `count` times.
    """
    device = next(model.parameters()).device
    found: list[RowLosses] = [[(0.0, 0)] * len(rows) for _ in range(count)]
    collate = batching.collator(learning=False)
    was_training = model.training
    model.eval()
    try:
        for chosen in track(batching.held_out_batches(rows), "evaluating batches"):
            batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
            counts = [rows[i].supervised for i in chosen]
            for own, losses in zip(found, losses_of(batch), strict=True):
                parts = losses.cpu().split(counts)
                for i, tokens, part in zip(chosen, counts, parts, strict=True):
                    own[i] = (part.double().sum().item(), tokens)
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
    """The losses of the batch's supervised tokens with each adapter."""
    if len(names) > 1:
        parts = [Part(name, batch) for name in names]
        return losses_of(model, loss, parts, pad_token_id)
    [name] = names
    with model.routing.using(Route(shared=() if name == BASE else (name,))):
        return [loss.of_tokens(model, batch)]
