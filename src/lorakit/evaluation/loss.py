"""The mean loss of a model over samples: one sum over one count, never a mean of batch means.

What is supervised is decided in `lorakit.data.masking`, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from lorakit.data.batches import Collator
from lorakit.data.masking import TokenizedRow, tokenize
from lorakit.data.mixing import each
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.models.loss import SupervisedLoss
from lorakit.progress import innermost

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row", bound=TokenizedRow)


def mean_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    max_length: int = 1024,
    batch_size: int = 8,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Cross-entropy in nats per supervised token over all `samples`.

    Args:
        max_length: longer rows are cut to so many tokens, as in training.
        batch_size: rows at a time, of like length; the result does not depend on it.
        on_batch: called after each batch with the number of its rows.

    Raises:
        InputError: there are no samples, or one has no token to predict.
    """
    rows = loss_rows(tokenizer, samples, max_length)
    return mean_row_loss(model, tokenizer, rows, batch_size, on_batch)


def loss_rows(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], max_length: int
) -> list[TokenizedRow]:
    """The rows that `mean_loss` is taken over; arguments and errors as there."""
    if not samples:
        raise InputError("there are no rows to take the loss of")
    return each(samples, lambda sample: tokenize(sample, tokenizer, max_length))


def mean_row_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """The mean loss over `rows`; arguments as in `mean_loss`."""
    pad = tokenizer.pad_token_id
    collate = Collator(pad if isinstance(pad, int) else 0)  # padding is masked: any token will do
    return mean_over(model, rows, collate, SupervisedLoss(model), batch_size, on_batch)


def mean_over(
    model: nn.Module,
    rows: Sequence[Row],
    collate: Callable[[list[Row]], dict[str, torch.Tensor]],
    loss: Callable[[nn.Module, dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """The summed `loss` of all rows by what it is a sum of; rows of like length share a batch."""
    import torch

    ordered = sorted(rows, key=len, reverse=True)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count, work = 0.0, 0, innermost()
    try:
        for at in range(0, len(ordered), batch_size):
            chosen = ordered[at : at + batch_size]
            batch = {name: tensor.to(device) for name, tensor in collate(chosen).items()}
            with torch.inference_mode():
                batch_total, batch_count = loss(model, batch)
            total += batch_total.item()
            count += int(batch_count)
            work.advance(len(chosen))
            if on_batch:
                on_batch(len(chosen))
    finally:
        model.train(was_training)
    return total / count
