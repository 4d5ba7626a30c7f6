"""Cross-entropy over the supervised positions of a batch, through the model's own forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

IGNORE = -100
"""The label of a position that is read but not learned (PyTorch's and transformers' value)."""


def supervised_loss(
    model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed negative log likelihood of the supervised tokens, in nats, and their number.

    Logits are asked for only where some row of the batch is supervised, when the model's forward
    can be told so (`logits_to_keep`); any softcapping or scaling of logits is the model's own.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, each (batch, seq). A position predicts
            the label after it.

    Returns: two scalars, the sum (float32 or wider) and the count (int64).
    """
    import torch.nn.functional as F

    targets = batch["labels"][:, 1:]
    keep = targets != IGNORE
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if _can_keep_logits(model):
        columns = keep.any(dim=0).nonzero().squeeze(1)
        targets, keep = targets[:, columns], keep[:, columns]
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    logits = logits[keep]
    if logits.element_size() < 4:
        logits = logits.float()
    return F.cross_entropy(logits, targets[keep], reduction="sum"), keep.sum()


def _can_keep_logits(model: nn.Module) -> bool:
    get_base_model = getattr(model, "get_base_model", None)
    inner = get_base_model() if callable(get_base_model) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
