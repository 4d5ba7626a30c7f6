"""What each held-out row costs: summed nats and supervised tokens, by the loss of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lorakit.data.masking import TokenizedRow
from lorakit.models.loss import SupervisedLoss
from lorakit.progress import track
from lorakit.sweeps.together.evaluate import RowLosses, in_batches
from lorakit.training.batching import Batching

if TYPE_CHECKING:
    from torch import nn

    from lorakit.objectives.objective import Collate, TrainingInputs

SplitLosses = dict[str, RowLosses]
"""By split, of each of its rows."""


def losses_of(
    model: nn.Module,
    begun: TrainingInputs,
    splits: Mapping[str, Sequence[TokenizedRow]],
    batching: Batching,
) -> SplitLosses:
    """The losses of the rows of each split, by the model as it is now, with its active adapters.

    Args:
        batching: how those of a causal language model become batches.
    """
    if begun.objective.name != "sft":
        own = begun.collator or batching.collator(learning=False)
        return {name: _one_by_one(model, begun, own, rows) for name, rows in splits.items()}
    loss = SupervisedLoss(model)
    return {
        name: in_batches(model, rows, batching, lambda b: [loss.of_tokens(model, b)])[0]
        for name, rows in splits.items()
    }


def all_rows(losses: Mapping[str, RowLosses]) -> RowLosses:
    """The losses of all splits together."""
    return [row for rows in losses.values() for row in rows]


@torch.no_grad()
def _one_by_one(
    model: nn.Module, begun: TrainingInputs, collate: Collate, rows: Sequence[TokenizedRow]
) -> RowLosses:
    """Losses of other tasks are sums over a batch, so that each row is one."""
    device = next(model.parameters()).device
    forward = begun.objective.forward(model)
    was_training = model.training
    model.eval()
    found = []
    try:
        for row in track(rows, "evaluating rows"):
            batch = {name: tensor.to(device) for name, tensor in collate([row]).items()}
            loss = begun.objective.loss(forward, batch)
            found.append((float(loss.total), int(loss.count)))
    finally:
        model.train(was_training)
    return found
