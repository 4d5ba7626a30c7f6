"""How a run's rows become batches: in a line or padded, counted by rows or by tokens.

Which rows share a batch is `data/grouping.py`'s, the tensors are `data/batches.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback

from lorakit.data.batches import Collator, LineCollator
from lorakit.data.grouping import (
    Batches,
    by_beginning,
    by_length,
    by_like_lengths,
    by_padded_tokens,
    by_rows,
    by_tokens,
    evened,
)
from lorakit.data.masking import TokenizedRow, sequences_of
from lorakit.data.prefixes import in_segments

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from lorakit.models.lines import Lines
    from lorakit.objectives.objective import Collate
    from lorakit.training.recipe import Recipe


_LOOKED_AT = 32  # batches that say how much rows have in common

EVAL_ROWS = 8
"""Held-out rows of a batch where rows are padded, if the recipe does not say how many."""


@dataclass(frozen=True)
class Batching:
    """What a batch is.

    Args:
        pad_token_id: what short rows are filled with; None for a model that takes rows in one
            line (`models.attention.take_lines`).
        pack_length: with it a batch of n is n times so many tokens, filled by best fit; without
            it a batch of n is n rows.
        own_collator: what makes the tensors where rows are not sequences of tokens.
        prefixes: the model takes prefixes that rows share (`models.lines.take_prefixes`).
        draws: there is dropout or noise in training, which each row is to have of its own.
        eval_rows: the held-out rows of a batch; None for as many as a pass takes well.
        to_batch: adds an objective's own tensors to those of a collator (`Objective.to_batch`).
    """

    pad_token_id: int | None
    pack_length: int | None = None
    own_collator: Collate | None = None
    prefixes: bool = False
    draws: bool = False
    eval_rows: int | None = None
    to_batch: Callable[[Sequence[TokenizedRow], Collate], dict[str, torch.Tensor]] | None = None

    def collator(self, *, learning: bool) -> Collate:
        """What makes one batch's tensors, of rows that are learned or held out."""
        collate = self._collator(learning)
        to_batch = self.to_batch
        return (lambda rows: to_batch(rows, collate)) if to_batch else collate

    def _collator(self, learning: bool) -> Collate:
        if self.own_collator is not None:
            return self.own_collator
        if self.pad_token_id is None:
            return LineCollator(self.prefixes and not (learning and self.draws))
        return Collator(self.pad_token_id)

    def train_batches(
        self, rows: Sequence[TokenizedRow], args: TrainingArguments, epoch: int
    ) -> Batches:
        """The batches of `epoch`, as many for every process of the run."""
        lengths, size = [len(row) for row in rows], args.per_device_train_batch_size
        if self.pack_length:
            batches = self._packed(lengths, size, args.seed, epoch)
        elif self.pad_token_id is None:
            batches = by_rows(len(rows), size, args.seed, epoch)
        else:
            together = args.gradient_accumulation_steps * args.world_size
            batches = by_like_lengths(lengths, size, args.seed, epoch, together)
        return evened(batches, args.world_size)

    def shared_tokens(self, rows: Sequence[TokenizedRow], args: TrainingArguments) -> float:
        """The share of the tokens of a batch that the others have and that are computed once.

        Of the first batches of an epoch.
        """
        collate = self._collator(learning=True)
        if not isinstance(collate, LineCollator) or not collate.share_prefixes:
            return 0.0
        several = [
            sequences_of(rows[i] for i in b) for b in self.train_batches(rows, args, 0)[:_LOOKED_AT]
        ]
        computed = sum(s.end - s.begin for batch in several for s in in_segments(batch))
        return 1 - computed / sum(len(row) for batch in several for row in batch)

    def eval_batches(self, rows: Sequence[TokenizedRow], args: TrainingArguments) -> Batches:
        """The batches of an evaluation by Trainer, as many for every process of the run."""
        if self.pack_length:
            size = args.per_device_eval_batch_size
            return self._packed([len(row) for row in rows], size, args.seed, 0)
        return evened(self.held_out_batches(rows), args.world_size)

    def held_out_batches(self, rows: Sequence[TokenizedRow]) -> Batches:
        """Batches of rows that have most in common: beginnings, or lengths."""
        if self.prefixes:
            return by_beginning([row.input_ids for row in rows], self.eval_rows)
        in_lines = self.pad_token_id is None
        size = self.eval_rows or (None if in_lines else EVAL_ROWS)
        return by_length([len(row) for row in rows], size)

    def _packed(self, lengths: list[int], size: int, seed: int, epoch: int) -> Batches:
        assert self.pack_length is not None
        pack = by_tokens if self.pad_token_id is None else by_padded_tokens
        return pack(lengths, size * self.pack_length, seed, epoch)


def choose_batching(
    recipe: Recipe, lines: Lines, pad_token_id: int, own_collator: Collate | None = None
) -> tuple[Batching, list[str]]:
    """How rows become batches, with what to say where that is not as the recipe has it.

    Args:
        lines: what the model takes.
        own_collator: the objective's, where rows are not sequences of tokens.
    """
    size = recipe.training.per_device_eval_batch_size
    pack_length = recipe.data.max_length if recipe.data.packing and not own_collator else None
    padded = Batching(pad_token_id, pack_length, own_collator, eval_rows=size)
    if own_collator or not recipe.data.padding_free:
        return padded, []
    if lines.refused:
        return padded, [f"rows are padded, those of like length together: {lines.refused}"]
    noise = (recipe.training.model_extra or {}).get("neftune_noise_alpha")
    return Batching(
        None,
        pack_length,
        prefixes=recipe.data.share_prefixes and lines.prefixes,
        eval_rows=size,
        draws=bool(recipe.lora.get("lora_dropout") or noise or lines.draws),
    ), []


class BatchDataset(Dataset):
    """Maps the positions of a batch's rows to the batch's tensors."""

    def __init__(self, rows: Sequence[TokenizedRow], batching: Batching, *, learning: bool) -> None:
        self.rows, self.collate = rows, batching.collator(learning=learning)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: list[int]) -> dict[str, torch.Tensor]:
        return self.collate([self.rows[i] for i in batch])


class EpochSampler(Sampler[list[int]], TrainerCallback):
    """The batches of one epoch after the other.

    A callback tells it the epoch, as a dataloader that skips batches to resume does not.
    """

    def __init__(self, plan: Callable[[int], Batches]) -> None:
        self.plan, self.epoch = plan, 0
        self._count = len(plan(0))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.plan(self.epoch))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes over the epoch that begins; resumed in its middle, `state.epoch` has a fraction."""
        self.epoch = math.floor(state.epoch or 0)


def only(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The collator of a dataloader whose items are batches already."""
    [batch] = batches
    return batch
