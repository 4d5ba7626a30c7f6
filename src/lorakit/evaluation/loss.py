"""The mean loss of a model over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lorakit.data.batches import Collator
from lorakit.data.formats import Sample
from lorakit.data.masking import tokenize
from lorakit.models.loss import supervised_loss

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def mean_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    max_length: int = 1024,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Nats per supervised token over all samples: one sum over one count."""
    import torch

    rows = sorted((tokenize(s, tokenizer, max_length) for s in samples), key=len, reverse=True)
    pad = tokenizer.pad_token_id
    collate = Collator(pad if isinstance(pad, int) else 0)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for at in range(0, len(rows), batch_size):
            batch = {k: t.to(device) for k, t in collate(rows[at : at + batch_size]).items()}
            with torch.inference_mode():
                batch_sum, batch_count = supervised_loss(model, batch)
            total, count = total + batch_sum.item(), count + int(batch_count)
            if on_batch:
                on_batch(len(rows[at : at + batch_size]))
    finally:
        model.train(was_training)
    return total / count
