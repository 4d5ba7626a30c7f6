"""How a run's rows become batches: in a line or padded, counted by rows or by tokens.

Which rows share a batch is `data/grouping.py`'s, the tensors are `data/batches.py`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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
from lorakit.data.picture_rows import made_by
from lorakit.data.prefixes import in_segments
from lorakit.data.streaming import BatchStream, Place, RowStream
from lorakit.rl.rollouts import with_ahead

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from lorakit.data.picture_rows import RowPictures
    from lorakit.models.lines import Lines
    from lorakit.objectives.objective import Collate
    from lorakit.training.recipe import Recipe


_LOOKED_AT = 32  # batches that say how much rows have in common

_BEGINS_KEPT = 4096  # more than a dataloader reads ahead, and than a step accumulates

_PLACES = "stream.json"

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
        sampled_together: batches of a process whose prompts are sampled together, where that are
            others than those of an optimizer step, and how often they are learned.
    """

    pad_token_id: int | None
    pack_length: int | None = None
    own_collator: Collate | None = None
    prefixes: bool = False
    draws: bool = False
    eval_rows: int | None = None
    to_batch: Callable[[Sequence[TokenizedRow], Collate], dict[str, torch.Tensor]] | None = None
    sampled_together: tuple[int, int] | None = None

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
        batches = evened(batches, args.world_size)
        if self.sampled_together is None:
            return batches
        return _repeated(batches, *self.sampled_together, args.world_size)

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

    def stream_batches(self, stream: RowStream, args: TrainingArguments) -> BatchStream:
        """The batches of this process, of rows that are read as they come."""
        size = args.per_device_train_batch_size
        return BatchStream(
            stream,
            size,
            budget=size * self.pack_length if self.pack_length else None,
            padded=self.pad_token_id is not None,
            part=args.process_index,
            of=args.world_size,
        )

    def _packed(self, lengths: list[int], size: int, seed: int, epoch: int) -> Batches:
        assert self.pack_length is not None
        pack = by_tokens if self.pad_token_id is None else by_padded_tokens
        return pack(lengths, size * self.pack_length, seed, epoch)


class FirstBatch(list[int]):
    """The rows of a batch, and of those behind it whose prompts are sampled with its own."""

    def __init__(self, rows: Sequence[int], ahead: Sequence[list[int]]) -> None:
        super().__init__(rows)
        self.ahead = ahead


def _repeated(batches: Batches, size: int, times: int, processes: int) -> Batches:
    """Each `size` batches of every process so many times, one time after the other.

    Those of a process that come first know the others.
    """
    found: Batches = []
    for at in range(0, len(batches), size * processes):
        together = batches[at : at + size * processes]
        found += [
            FirstBatch(together[i], together[i + processes :: processes]) for i in range(processes)
        ]
        found += [*together[processes:], *together * (times - 1)]
    return found


def choose_batching(
    recipe: Recipe,
    lines: Lines,
    pad_token_id: int,
    own_collator: Collate | None = None,
    why_padded: Callable[[], str | None] = lambda: None,
) -> tuple[Batching, list[str]]:
    """How rows become batches, with what to say where that is not as the recipe has it.

    Args:
        lines: what the model takes.
        own_collator: the objective's, where rows are not sequences of tokens.
        why_padded: says why these rows are not put in lines by a model that takes them.
    """
    size = recipe.training.per_device_eval_batch_size
    pack_length = recipe.data.max_length if recipe.data.packing and not own_collator else None
    padded = Batching(pad_token_id, pack_length, own_collator, eval_rows=size)
    if own_collator or not recipe.data.padding_free:
        return padded, []
    if refused := lines.refused or why_padded():
        return padded, [f"rows are padded, those of like length together: {refused}"]
    noise = (recipe.training.model_extra or {}).get("neftune_noise_alpha")
    return Batching(
        None,
        pack_length,
        prefixes=recipe.data.share_prefixes and lines.prefixes,
        eval_rows=size,
        draws=bool(recipe.lora.get("lora_dropout") or noise or lines.draws),
    ), []


class BatchDataset(Dataset):
    """Maps the positions of a batch's rows to the batch's tensors.

    Attributes:
        pictures: gives the tensors of rows' pictures; None is the model's processor.
    """

    pictures: Callable[[Sequence[RowPictures]], dict[str, torch.Tensor]] | None = None

    def __init__(self, rows: Sequence[TokenizedRow], batching: Batching, *, learning: bool) -> None:
        self.rows, self.collate = rows, batching.collator(learning=learning)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: list[int]) -> dict[str, torch.Tensor]:
        with made_by(self.pictures):
            made = self.collate([self.rows[i] for i in batch])
            if not isinstance(batch, FirstBatch):
                return made
            # Rows that are learned with these, for the answers that are sampled for all of them.
            ahead = [self.collate([self.rows[i] for i in other]) for other in batch.ahead]
        return with_ahead(made, ahead)


class StreamDataset(Dataset):
    """Maps the number of a batch to the tensors of a process' next batch of a stream.

    Args:
        batches: of this process; those of all processes are numbered in turn.
        first_rows: what forecasts are made with: a list of their positions is a batch too.
        length: the batches of the whole run, of all processes.
    """

    def __init__(
        self,
        batches: BatchStream,
        first_rows: Sequence[TokenizedRow],
        batching: Batching,
        length: int,
    ) -> None:
        self.batches, self.rows, self.length = batches, first_rows, length
        self.collate = batching.collator(learning=True)
        self._next = 0  # of this process
        self._begins: dict[int, Place] = {}  # of the last batches

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, batch: int | list[int]) -> dict[str, torch.Tensor]:
        if isinstance(batch, list):
            return self.collate([self.rows[i] for i in batch])
        number = batch // self.batches.of
        if number < self._next:
            self.resume(0, Place())
        rows: list[TokenizedRow] = []
        while self._next <= number:
            self._begins[self._next] = self.batches.place
            self._begins.pop(self._next - _BEGINS_KEPT, None)
            rows = self.batches.next_batch()
            self._next += 1
        return self.collate(rows)

    def place_of(self, number: int) -> Place:
        """Where the batch of this number begins, of the last ones that were made or the next."""
        return self.batches.place if number == self._next else self._begins[number]

    def resume(self, number: int, place: Place) -> None:
        """Lets the batch of this number be the next one, and begin at `place`."""
        self._begins.clear()
        self.batches.seek(place)
        self._next = number


def write_places(checkpoint: Path, places: Sequence[Place]) -> None:
    """Writes where the processes of a run are in its stream into a checkpoint."""
    text = json.dumps([asdict(place) for place in places])
    (checkpoint / _PLACES).write_text(text, encoding="utf-8")


def read_place(checkpoint: Path, part: int, of: int) -> Place | None:
    """Where process `part` of `of` goes on in its stream; None where the run had none.

    With another number of processes than the run had, it is where the slowest of them was.
    """
    if not (checkpoint / _PLACES).is_file():
        return None
    places = [Place(**one) for one in json.loads((checkpoint / _PLACES).read_text("utf-8"))]
    if len(places) == of:
        return places[part]
    first = min(places, key=lambda place: (place.passes, place.rows))
    return Place(first.passes, first.rows * len(places) // of)


class EpochSampler(Sampler[Any], TrainerCallback):
    """The batches of one epoch after the other, each by its rows' positions or its number.

    A callback tells it the epoch, as a dataloader that skips batches to resume does not.
    """

    def __init__(self, plan: Callable[[int], Sequence[Any]]) -> None:
        self.plan, self.epoch = plan, 0
        self._count = len(plan(0))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return iter(self.plan(self.epoch))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes over the epoch that begins; resumed in its middle, `state.epoch` has a fraction."""
        self.epoch = math.floor(state.epoch or 0)


def only(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The collator of a dataloader whose items are batches already."""
    [batch] = batches
    return batch
