"""Rows that are read as they come, for data larger than memory (`data.streaming`).

The sources are read one behind the other, and again when they end. Rows come through a shuffle
buffer, as in the library `datasets`: one that is drawn at random goes out, the next one that is
read takes its place. The seed and the number of the pass alone decide the order, so that a place
in it is found again without what was learned before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from lorakit.data.mixing import Sources, as_sources
from lorakit.data.sources import Contents, Piece, Row, open_pieces
from lorakit.errors import InputError, count

if TYPE_CHECKING:
    from lorakit.data.masking import TokenizedRow

LOOKED_AT = 256
"""The first rows of each source, by which check, advice and forecast judge all of them."""

Columns = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """A place in a process' share of a stream, behind everything that was learned.

    Attributes:
        passes: over the sources, that are done.
        rows: of this pass and of the process, that are done.
        parts: of the next row (a long text is several), that are done.
    """

    passes: int = 0
    rows: int = 0
    parts: int = 0


@dataclass
class RowStream:
    """The rows to learn from, read as they come.

    Args:
        pieces: what is read, in order, each with its columns' names.
        buffer_size: rows of the shuffle buffer; with 1 the order stays as it is.
        limit: read only so many of the first rows of each piece.
        to_rows: a row's sequences of tokens; what of it is left out as too long comes second.

    Attributes:
        left_out, first_left_out: how many sequences were too long, and where the first one is.
    """

    pieces: Sequence[tuple[Piece, Columns]]
    buffer_size: int
    seed: int
    limit: int | None
    to_rows: Callable[[Row, Columns], tuple[list[TokenizedRow], list[TokenizedRow]]]
    left_out: int = 0
    first_left_out: str = ""

    def rows(self, passes: int, begin: int, every: int) -> Iterator[tuple[Row, Columns]]:
        """Each `every`-th row of a pass, from the row `begin` of its shuffled order on.

        Raises:
            InputError: a row is broken, or a file.
        """
        generator = random.Random(f"{self.seed}/{passes}")
        order = _shuffled(self._records(), self.buffer_size, generator)
        for at, number, record in islice(order, begin, None, every):
            piece, columns = self.pieces[at]
            yield piece.row(number, record), columns

    def _records(self) -> Iterator[tuple[int, int, Any]]:
        for at, (piece, _) in enumerate(self.pieces):
            for number, record in islice(piece.records(), self.limit):
                yield at, number, record

    def notice(self) -> list[str]:
        """What to say of rows that were too long."""
        if not self.left_out:
            return []
        return [
            f"{count(self.left_out, 'row')} left out as too long (first: {self.first_left_out}): "
            "raise data.max_length"
        ]


@dataclass
class BatchStream:
    """The batches of one process of a run, one after the other.

    Args:
        part, of: the process takes each `of`-th row, from the row `part` on.
        size: rows of a batch, or where there is a `budget` their tokens: rows are taken until the
            next one does not fit.
        padded: rows of a batch are padded to the longest of them.

    Attributes:
        place: behind the last batch.
    """

    stream: RowStream
    size: int
    budget: int | None = None
    padded: bool = False
    part: int = 0
    of: int = 1
    place: Place = Place()
    _rows: Iterator[tuple[TokenizedRow, Place]] = field(init=False)
    _waiting: tuple[TokenizedRow, Place] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.seek(self.place)

    def seek(self, place: Place) -> None:
        """Lets the next batch begin at a place; rows before it are read and not tokenised."""
        self.place, self._rows, self._waiting = place, self._from(place), None

    def next_batch(self) -> list[TokenizedRow]:
        """The rows of the next batch.

        Raises:
            InputError: a row is broken, or none of all can be learned.
        """
        batch: list[TokenizedRow] = []
        while self.budget is not None or len(batch) < self.size:
            row, behind = self._waiting or next(self._rows)
            if self._is_full(batch, row):
                self._waiting = row, behind
                break
            batch.append(row)
            self.place, self._waiting = behind, None
        return batch

    def _is_full(self, batch: Sequence[TokenizedRow], row: TokenizedRow) -> bool:
        if self.budget is None or not batch:
            return False
        lengths = [len(one) for one in (*batch, row)]
        return (len(lengths) * max(lengths) if self.padded else sum(lengths)) > self.budget

    def _from(self, place: Place) -> Iterator[tuple[TokenizedRow, Place]]:
        """The sequences from a place on without end, each with the place behind it."""
        passes, done, skipped = place.passes, place.rows, place.parts
        while True:
            empty = not done
            begin = self.part + done * self.of
            for row, columns in self.stream.rows(passes, begin, self.of):
                parts, left_out = self.stream.to_rows(row, columns)
                if left_out and not skipped:
                    self.stream.first_left_out = self.stream.first_left_out or row.where
                    self.stream.left_out += len(left_out)
                for i, part in enumerate(parts[skipped:], skipped + 1):
                    empty, last = False, i == len(parts)
                    yield part, Place(passes, done + last, 0 if last else i)
                done, skipped = done + 1, 0
            if empty:
                raise InputError(
                    "data.train: a whole pass over it has no row that can be learned"
                    + (f" by process {self.part + 1} of {self.of}" if self.of > 1 else "")
                    + "".join(f": {line}" for line in self.stream.notice())
                )
            passes, done = passes + 1, 0


def open_stream(
    sources: Sources,
    columns: Columns | None,
    limit: int | None,
    seed: int,
    buffer_size: int,
    to_rows: Callable[[Row, Columns], tuple[list[TokenizedRow], list[TokenizedRow]]],
) -> RowStream:
    """The stream of one source or several.

    Args:
        columns: of sources that do not bring their own.
        limit: use only the first rows of each source.
        buffer_size, seed, to_rows: as in `RowStream`.

    Raises:
        InputError: there is nothing to read, or a source has a weight.
    """
    pieces: list[tuple[Piece, Columns]] = []
    for source in as_sources(sources):
        if source.weight != 1:
            raise InputError(
                f"the weight of {source.path} is {source.weight:g}: with data.streaming sources "
                "are read one behind the other, as they are: leave it out"
            )
        own = source.columns if source.columns is not None else columns
        pieces += [(piece, own or {}) for piece in open_pieces(source.path)[0]]
    return RowStream(pieces, buffer_size, seed, limit, to_rows)


def first_rows(path: str, full_names: bool, wanted: Sequence[str]) -> Contents:
    """The first rows of a source, in the place of `read_source`."""
    pieces, digest, notices = open_pieces(path, wanted)
    records = ((piece, *one) for piece in pieces for one in piece.records())
    rows = [piece.row(number, record) for piece, number, record in islice(records, LOOKED_AT)]
    if not rows:
        raise InputError(f"{path}: holds no rows; give a file with at least one")
    if full_names:
        rows = [replace(row, name=row.name or str(row.path)) for row in rows]
    return Contents(rows, digest(), notices)


def _shuffled(items: Iterator[Any], size: int, generator: random.Random) -> Iterator[Any]:
    """`items` through a buffer of so many of them."""
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        at = generator.randrange(size)
        yield buffer[at]
        buffer[at] = item
    generator.shuffle(buffer)
    yield from buffer
