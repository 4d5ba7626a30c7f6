"""Held-out loss and scores of a model over samples, by an objective: one sum over one count, never
a mean of batch means.

What is supervised is decided by the objective, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.data.batches import Collator
from lorakit.data.mixing import each
from lorakit.errors import InputError
from lorakit.objectives.registry import default_objective
from lorakit.progress import innermost

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.masking import TokenizedRow
    from lorakit.data.samples import Sample
    from lorakit.objectives.objective import Objective


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
    objective = default_objective("CAUSAL_LM")
    rows = rows_of(objective, tokenizer, samples, max_length)
    return held_out_scores(objective, model, tokenizer, rows, batch_size, on_batch)["loss"]


def rows_of(
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Any],
    max_length: int,
) -> list[TokenizedRow]:
    """The rows that `held_out_scores` are taken over; arguments and errors as in `mean_loss`."""
    if not samples:
        raise InputError("there are no rows to take the loss of")
    return each(samples, lambda sample: objective.tokenize(sample, tokenizer, max_length))


def held_out_scores(
    objective: Objective,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """The `loss` of `rows` and the objective's scores; rows of like length share a batch."""
    import torch

    pad = tokenizer.pad_token_id
    # Padding is masked: any token will do.
    collate = objective.collator(tokenizer) or Collator(pad if isinstance(pad, int) else 0)
    forward = objective.forward(model)
    ordered = sorted(rows, key=len, reverse=True)
    device = next(model.parameters()).device
    was_training, work = model.training, innermost()
    sums: dict[str, torch.Tensor] = {}
    model.eval()
    try:
        for at in range(0, len(ordered), batch_size):
            chosen = ordered[at : at + batch_size]
            batch = {name: tensor.to(device) for name, tensor in collate(chosen).items()}
            with torch.inference_mode():
                found = objective.loss(forward, batch).sums()
            sums = {name: sums.get(name, 0) + value for name, value in found.items()}
            work.advance(len(chosen))
            if on_batch:
                on_batch(len(chosen))
    finally:
        model.train(was_training)
    return objective.held_out(sums)
