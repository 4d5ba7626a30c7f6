"""Held-out loss and scores of a model over samples, by an objective: one sum over one count, never
a mean of batch means.

What is supervised is decided by the objective, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorakit.data.batches import Collator
from lorakit.errors import InputError, each
from lorakit.objectives.objective import Objective, added, as_tensors, with_sums
from lorakit.objectives.registry import default_objective
from lorakit.progress import innermost, track

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.masking import TokenizedRow
    from lorakit.data.samples import Sample

RowLosses = list[tuple[float, int]]
"""Of each row: its summed nats, and its supervised tokens."""


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

    def row(sample: Any) -> TokenizedRow:
        made = objective.tokenize(sample, tokenizer, max_length)
        if made.truncated and not made.supervised:
            raise InputError(
                f"{made.where}: nothing to score is left before data.max_length {max_length}; "
                f"raise it to {made.longest} or shorten the row"
            )
        return made

    return [*objective.together(each(samples, row), max_length)]


def held_out_scores(
    objective: Objective,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """The `loss` of `rows` and the objective's scores; rows of like length share a batch."""
    pad = tokenizer.pad_token_id
    # Padding is masked: any token will do.
    collate = objective.collator(tokenizer) or Collator(pad if isinstance(pad, int) else 0)
    forward = objective.forward(model)
    ordered, work = sorted(rows, key=len, reverse=True), innermost()
    batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    before: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    with evaluating(model) as device:

        def batch_of(some: Sequence[TokenizedRow]) -> dict[str, torch.Tensor]:
            made = objective.to_batch(some, collate)
            return {name: tensor.to(device) for name, tensor in made.items()}

        for chosen in batches if objective.needs_all_batches else ():
            found = objective.beforehand(forward, batch_of(chosen))
            before = added(before, as_tensors(found))
        for chosen in batches:
            batch = with_sums(batch_of(chosen), before)
            sums = added(sums, objective.loss(forward, batch).sums())
            work.advance(len(chosen))
            if on_batch:
                on_batch(len(chosen))
    return objective.held_out(sums)


def row_losses(
    model: nn.Module,
    rows: Sequence[TokenizedRow],
    batches: Sequence[list[int]],
    collate: Callable[[list[TokenizedRow]], dict[str, torch.Tensor]],
    token_losses: Callable[[dict[str, torch.Tensor]], list[torch.Tensor]],
    several: int = 1,
) -> list[RowLosses]:
    """What each row costs, in the order of `rows`, as often as `token_losses` takes a batch.

    Args:
        batches: the positions of rows that share a batch.
        token_losses: the loss (n,) of every supervised token of a batch, row after row, for each
            of `several` adapters.
    """
    found: list[RowLosses] = [[(0.0, 0)] * len(rows) for _ in range(several)]
    with evaluating(model) as device:
        for chosen in track(batches, "evaluating batches"):
            tensors = collate([rows[i] for i in chosen])
            counts = [rows[i].supervised for i in chosen]
            by_adapter = token_losses({k: t.to(device) for k, t in tensors.items()})
            for own, losses in zip(found, by_adapter, strict=True):
                parts = losses.cpu().split(counts)
                for i, tokens, part in zip(chosen, counts, parts, strict=True):
                    own[i] = (part.double().sum().item(), tokens)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """The device of `model`, which evaluates without gradients while the block runs."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)
