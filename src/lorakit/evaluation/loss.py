"""The mean loss of a model over samples: one sum over one count, never a mean of batch means.

What is supervised is decided in `lorakit.data.masking`, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lorakit.data.batches import Collator
from lorakit.data.formats import Sample
from lorakit.data.masking import tokenize
from lorakit.errors import InputError
from lorakit.models.loss import SupervisedLoss

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


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
    import torch

    if not samples:
        raise InputError("there are no rows to take the loss of")
    rows = sorted((tokenize(s, tokenizer, max_length) for s in samples), key=len, reverse=True)
    pad = tokenizer.pad_token_id
    collate = Collator(pad if isinstance(pad, int) else 0)  # padding is masked: any token will do
    supervised_loss = SupervisedLoss(model)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for at in range(0, len(rows), batch_size):
            chosen = rows[at : at + batch_size]
            batch = {name: tensor.to(device) for name, tensor in collate(chosen).items()}
            with torch.inference_mode():
                batch_total, batch_count = supervised_loss(model, batch)
            total += batch_total.item()
            count += int(batch_count)
            if on_batch:
                on_batch(len(chosen))
    finally:
        model.train(was_training)
    return total / count
