"""How a run's rows become batches: in a line or padded, counted by rows or by tokens.

Which rows share a batch is `data/grouping.py`'s, the tensors are `data/batches.py`'s; here they
meet Trainer's arguments and its dataloader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback

from lorakit.data.batches import Collator, LabelCollator, LineCollator
from lorakit.data.grouping import (
    Batches,
    by_like_lengths,
    by_padded_tokens,
    by_rows,
    by_tokens,
    cut,
    evened,
)
from lorakit.data.masking import TokenizedRow

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments
    from transformers.trainer_callback import TrainerControl, TrainerState


@dataclass(frozen=True)
class Batching:
    """What a batch is.

    Args:
        pad_token_id: what short rows are filled with; None for a model that takes rows in one
            line (`models.attention.take_lines`).
        pack_length: with it a batch of n is n times so many tokens, filled by best fit; without
            it a batch of n is n rows.
        own_collator: what makes the tensors of rows that are no causal language model's.
    """

    pad_token_id: int | None
    pack_length: int | None = None
    own_collator: LabelCollator | None = None

    def collator(self) -> Collator | LabelCollator | LineCollator:
        """What makes one batch's tensors."""
        if self.own_collator is not None:
            return self.own_collator
        return LineCollator() if self.pad_token_id is None else Collator(self.pad_token_id)

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

    def eval_batches(self, rows: Sequence[TokenizedRow], args: TrainingArguments) -> Batches:
        """The batches of an evaluation, rows of like length together, the longest first."""
        lengths, size = [len(row) for row in rows], args.per_device_eval_batch_size
        if self.pack_length:
            return self._packed(lengths, size, args.seed, 0)
        order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
        return cut(order, size)

    def _packed(self, lengths: list[int], size: int, seed: int, epoch: int) -> Batches:
        assert self.pack_length is not None
        pack = by_tokens if self.pad_token_id is None else by_padded_tokens
        return pack(lengths, size * self.pack_length, seed, epoch)


class BatchDataset(Dataset):
    """Maps the positions of a batch's rows to the batch's tensors."""

    def __init__(self, rows: Sequence[TokenizedRow], batching: Batching) -> None:
        self.rows, self.collate = rows, batching.collator()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: list[int]) -> dict[str, torch.Tensor]:
        return self.collate([self.rows[i] for i in batch])


class EpochSampler(Sampler[list[int]], TrainerCallback):
    """The batches of one epoch after the other.

    It learns the epoch as a callback, because a dataloader that skips batches to resume does not
    pass the epoch on to its sampler.
    """

    def __init__(self, plan: Callable[[int], Batches]) -> None:
        self.plan, self.epoch = plan, 0
        self._count = len(plan(0))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.plan(self.epoch))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes over the epoch that begins; resumed in its middle, `state.epoch` has a fraction."""
        self.epoch = math.floor(state.epoch or 0)


def only(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The collator of a dataloader whose items are batches already."""
    [batch] = batches
    return batch
