"""Held-out loss and scores of a model over rows, by an objective: one sum over one count, never a
mean of batch means. What is supervised is decided by the objective, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.data.batches import Collator, LineCollator
from lorakit.data.grouping import by_beginning, cut
from lorakit.data.masking import sequences_of
from lorakit.data.picture_rows import has_pictures
from lorakit.data.too_long import WHOLE, divided
from lorakit.errors import InputError, each
from lorakit.models.loaded import in_evaluation
from lorakit.objectives.batch_sums import Loss, added, as_tensors, with_sums
from lorakit.objectives.objective import Objective
from lorakit.objectives.registry import default_objective
from lorakit.progress import innermost, task

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.masking import TokenizedRow
    from lorakit.data.samples import Sample

Row = TypeVar("Row")
Sums = dict[str, "torch.Tensor"]
"""`Loss.sums`: `total`, `count` and the objective's metrics."""

Judge = Callable[["TokenizedRow", "torch.Tensor"], Sums]
"""Makes a row's sums of the losses (n,) of its supervised tokens, float64 on the CPU."""


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
        max_length: longer rows are cut to this many tokens, as in training.
        batch_size: rows at a time; the result does not depend on it.
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
    """The rows that `held_out_scores` are taken over; arguments and errors as in `mean_loss`.

    A long text is several of them where the objective divides it.
    """
    if not samples:
        raise InputError("there are no rows to take the loss of")

    def parts(sample: Any) -> list[TokenizedRow]:
        if objective.too_long == "split":
            whole = objective.tokenize(sample, tokenizer, WHOLE)
            return divided(whole, max_length, objective.overlap)
        made = objective.tokenize(sample, tokenizer, max_length)
        if not made.supervised and not made.truncated:
            raise InputError(f"{made.where}: has no answer to score: give the row one")
        if made.truncated and not made.supervised:
            raise InputError(
                f"{made.where}: nothing to score is left before data.max_length {max_length}; "
                f"raise it to {made.longest} or shorten the row"
            )
        return [made]

    rows = [row for several in each(samples, parts) for row in several]
    return [*objective.together(rows, max_length)]


def held_out_scores(
    objective: Objective,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """The `loss` of `rows` and the objective's scores; see `planned` for what shares a batch."""
    sums: dict[str, torch.Tensor] = {}
    batches, collate = planned(objective, model, tokenizer, rows, batch_size)
    for chosen, loss in batch_losses(objective, model, rows, batches, collate):
        sums = added(sums, loss.sums())
        if on_batch:
            on_batch(len(chosen))
    return objective.held_out(sums)


def planned(
    objective: Objective,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    batch_size: int,
) -> tuple[list[list[int]], Callable[[list[TokenizedRow]], dict[str, torch.Tensor]]]:
    """Batches of so many rows, by their positions, and what makes their tensors.

    As in training rows lie in one line where the model takes that, those together that begin
    alike; else rows of like length are padded, and those with pictures.
    """
    from lorakit.models.lines import Lines

    if objective.collator(tokenizer) is None and not any(map(has_pictures, sequences_of(rows))):
        lines = Lines(model)
        if lines.refused is None:
            line = LineCollator(lines.prefixes)
            alike = by_beginning([row.input_ids for row in rows], batch_size)
            return alike, lambda some: objective.to_batch(some, line)
    return longest_first(rows, batch_size), collator_of(objective, tokenizer)


def collator_of(
    objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[TokenizedRow]], dict[str, torch.Tensor]]:
    """Makes an objective's batches of padded rows."""
    pad = tokenizer.pad_token_id
    # Padding is masked: any token will do.
    collate = objective.collator(tokenizer) or Collator(pad if isinstance(pad, int) else 0)
    return lambda rows: objective.to_batch(rows, collate)


def batch_losses(
    objective: Objective,
    model: nn.Module,
    rows: Sequence[TokenizedRow],
    batches: Sequence[list[int]],
    collate: Callable[[list[TokenizedRow]], dict[str, torch.Tensor]],
) -> Iterator[tuple[list[int], Loss]]:
    """The objective's loss of each batch, with what it needs to know of all of them."""
    forward = objective.forward(model)
    before = sums_beforehand(objective, model, rows, batches, collate)
    for chosen, batch in evaluating(model, rows, batches, collate):
        yield chosen, objective.loss(forward, with_sums(batch, before))


def row_sums(
    model: nn.Module,
    rows: Sequence[TokenizedRow],
    batches: Sequence[list[int]],
    collate: Callable[[list[TokenizedRow]], dict[str, torch.Tensor]],
    token_losses: Callable[[dict[str, torch.Tensor]], list[torch.Tensor]],
    judges: Sequence[Judge],
) -> list[list[Sums]]:
    """What each of `judges` makes of each row, in the order of `rows`.

    Args:
        batches: the positions of rows that share a batch.
        token_losses: the loss (n,) of every supervised token of a batch, row after row, for each
            of the judges: those of one adapter each.
    """
    found: list[list[Sums]] = [[{}] * len(rows) for _ in judges]
    with task("evaluating rows", len(rows)):
        for chosen, batch in evaluating(model, rows, batches, collate):
            counts = [rows[i].supervised for i in chosen]
            for own, judge, losses in zip(found, judges, token_losses(batch), strict=True):
                parts = losses.cpu().double().split(counts)
                for i, part in zip(chosen, parts, strict=True):
                    own[i] = judge(rows[i], part)
    return found


def know_constants(
    objective: Objective,
    model: nn.Module,
    rows: Sequence[TokenizedRow],
    batches: Sequence[list[int]],
    collate: Callable[[list[TokenizedRow]], dict[str, torch.Tensor]],
) -> None:
    """Computes `Objective.row_constants` of these rows, unless they are known already."""
    if not objective.has_constants or objective.constants.of(rows):
        return
    forward = objective.forward(model)
    for chosen, batch in evaluating(model, rows, batches, collate, counts=False):
        values = as_tensors(objective.row_constants(forward, batch))
        objective.constants.add([rows[i] for i in chosen], values)


def sums_beforehand(
    objective: Objective,
    model: nn.Module,
    rows: Sequence[TokenizedRow],
    batches: Sequence[list[int]],
    collate: Callable[[list[TokenizedRow]], dict[str, torch.Tensor]],
) -> Sums:
    """What `Objective.beforehand` gives of all these rows; nothing where it needs nothing."""
    found: Sums = {}
    if objective.needs_all_batches:
        forward = objective.forward(model)
        for _, batch in evaluating(model, rows, batches, collate, counts=False):
            found = added(found, as_tensors(objective.beforehand(forward, batch)))
    return found


def evaluating(
    model: nn.Module,
    rows: Sequence[Row],
    batches: Iterable[list[int]],
    collate: Callable[[list[Row]], dict[str, torch.Tensor]],
    counts: bool = True,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Each batch: the positions of its rows, and their tensors on the device of `model`.

    From the first batch to the last the model is in evaluation mode, without gradients. With
    `counts` the rows that are done are counted in the innermost task.
    """
    import torch

    device = next(model.parameters()).device
    work = innermost()
    done = work.done
    with in_evaluation(model), torch.no_grad():
        for chosen in batches:
            tensors = collate([rows[i] for i in chosen])
            yield chosen, {name: tensor.to(device) for name, tensor in tensors.items()}
            if counts:
                done += len(chosen)
                work.update(done)


def longest_first(rows: Sequence[Any], size: int) -> list[list[int]]:
    """The positions of rows of like length in batches of `size`.

    A batch that is too large for the memory fails at once.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    return cut(order, size)
