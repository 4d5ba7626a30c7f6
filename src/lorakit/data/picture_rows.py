"""Rows with pictures as tokens, and the tensors of their pictures in a batch.

What a picture becomes in a text is the processor's to say (`models.picture_reader`). Its tokens
are read and never learned, and a row is never cut inside of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.pictures import label, open_picture
from lorakit.errors import InputError
from lorakit.models.picture_reader import reader_of, why_unread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from PIL.Image import Image

    from lorakit.models.picture_reader import Expanded, PictureReader


@dataclass(frozen=True, slots=True)
class PlacedPicture:
    """A picture and the tokens [begin, end) that stand for it in a row."""

    source: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class RowPictures:
    """The pictures of a row, in order, and who reads them."""

    placed: tuple[PlacedPicture, ...]
    reader: PictureReader

    def within(self, tokens: int, where: str = "the row") -> tuple[RowPictures, int]:
        """The pictures that the first `tokens` tokens have whole, and how many tokens are left.

        A row that would end inside of a picture ends before it.

        Raises:
            InputError: these pictures would have other tokens without the rest of the row's.
        """
        whole = tuple(one for one in self.placed if one.end <= tokens)
        if 0 < len(whole) < len(self.placed):
            images = opened([one.source for one in self.placed], where)
            if not self.reader.reads_alone(images, len(whole)):
                raise InputError(
                    f"{where}: is cut behind {len(whole)} of {len(self.placed)} pictures, which "
                    "this model reads in another form without the others: raise data.max_length, "
                    "or drop the row"
                )
        partly = [one.begin for one in self.placed if one.begin < tokens < one.end]
        return RowPictures(whole, self.reader), min([tokens, *partly])


_done: ContextVar[Counter[str] | None] = ContextVar("done_to_pictures", default=None)


@contextmanager
def counting(done: Counter[str]) -> Iterator[None]:
    """Within the block, what is done to pictures that are not plain is counted in `done`."""
    token = _done.set(done)
    try:
        yield
    finally:
        _done.reset(token)


def opened(sources: Sequence[str], where: str = "") -> list[Image]:
    """The pictures in RGB.

    Raises:
        InputError: one cannot be read; it names the row and the picture.
    """
    found, counts = [], _done.get()
    for source in sources:
        try:
            image, done = open_picture(source)
        except InputError as error:
            place = f"{where}: " if where else ""
            raise InputError(f"{place}the picture {label(source)} {error}") from error
        found.append(image)
        if counts is not None:
            counts.update(done)
    return found


def expanded(text: str, sources: Sequence[str], tokenizer: Any, where: str) -> Expanded:
    """A rendered conversation with the tokens of its pictures in it.

    Raises:
        InputError: the model reads no pictures, one cannot be used, or the text has more or fewer
            places for them.
    """
    if (reader := reader_of(tokenizer)) is None:
        raise InputError(f"{where}: has pictures, and {why_unread(tokenizer)}, or drop the row")
    places = text.count(reader.token)
    if places != len(sources):
        raise InputError(
            f"{where}: has {len(sources)} pictures, and as the chat template writes it "
            f"{places} times {reader.token}: remove that from the text, or use a template that "
            "shows pictures"
        )
    try:
        return reader.expand(text, opened(sources, where))
    except InputError as error:
        if str(error).startswith(where):
            raise
        raise InputError(f"{where}: {error}") from error


def placed(
    sources: Sequence[str], places: Sequence[tuple[int, int]], starts: Sequence[int]
) -> tuple[PlacedPicture, ...]:
    """The pictures by tokens; `places` are their characters, `starts` those of all tokens."""
    return tuple(
        PlacedPicture(source, bisect_left(starts, begin), bisect_left(starts, end))
        for source, (begin, end) in zip(sources, places, strict=True)
    )


_tensors: ContextVar[Callable[[Sequence[RowPictures]], dict[str, torch.Tensor]] | None]
_tensors = ContextVar("tensors_of_pictures", default=None)


@contextmanager
def made_by(
    make: Callable[[Sequence[RowPictures]], dict[str, torch.Tensor]] | None,
) -> Iterator[None]:
    """Within the block, `make` gives what `tensors_of` has of pictures; None is the processor."""
    token = _tensors.set(make)
    try:
        yield
    finally:
        _tensors.reset(token)


def tensors_of(rows: Sequence[Any]) -> tuple[dict[str, torch.Tensor], dict[str, list[list[int]]]]:
    """What a model is given of the pictures of token sequences, beside their tokens.

    Args:
        rows: `TokenizedRow`s.

    Returns: tensors of all pictures in the order of the rows; and by name, of each row, a number
        for each token. Both are empty where no row has a picture.
    """
    having = [row.pictures for row in rows if row.pictures is not None and row.pictures.placed]
    if not having:
        return {}, {}
    if (make := _tensors.get()) is not None:
        return make(having), kinds_of(rows)
    reader = having[0].reader
    images = [
        opened([one.source for one in row.pictures.placed], row.where)
        for row in rows
        if row.pictures is not None and row.pictures.placed
    ]
    return reader.tensors(images), kinds_of(rows)


def kinds_of(rows: Sequence[Any]) -> dict[str, list[list[int]]]:
    """By the model's name for it, of each row a number for each token: whether it is of a picture.

    Empty where the model does not ask for it, and where no row has a picture.
    """
    having = [row.pictures for row in rows if row.pictures is not None and row.pictures.placed]
    if not having:
        return {}
    kinds = [having[0].reader.kinds(row.input_ids) for row in rows]
    return {name: [kind[name] for kind in kinds] for name in kinds[0]}


def has_pictures(row: Any) -> bool:
    """Whether a row, or a sequence of it, has a picture."""
    return any(s.pictures is not None and s.pictures.placed for s in row.sequences)
