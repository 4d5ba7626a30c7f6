"""Rows of more tokens than a run reads: cut, left out, divided, or an error (`data.too_long`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from lorakit.data.label_rows import LabelledRow
from lorakit.data.masking import IGNORE, RowGroup, TokenizedRow
from lorakit.errors import InputError

TooLong = Literal["cut", "drop", "error", "split"]
"""What becomes of a row that is too long.

`cut`: its end is not learned; `drop`: the row is left out; `error`: nothing is learned at all;
`split`: plain text becomes several rows, and conversations are cut.
"""

WHOLE = 2**31
"""Tokens: no row has so many."""

Sample = TypeVar("Sample")
Row = TypeVar("Row", bound=TokenizedRow)


@dataclass(frozen=True)
class Limit:
    """How many tokens of a row a run reads.

    Attributes:
        max_length: what the recipe says (`data.max_length`).
        positions: the most that the model has positions for; None where it has no such number.
    """

    max_length: int
    positions: int | None = None

    @property
    def tokens(self) -> int:
        """The smaller of the two."""
        return min(self.max_length, self.positions or self.max_length)

    def __str__(self) -> str:
        if self.tokens < self.max_length:
            return f"the {self.tokens:,} tokens that the model reads"
        return f"max_length {self.max_length}"

    def cure(self, longest: int) -> str:
        """What keeps a row of `longest` tokens whole."""
        if self.positions and longest > self.positions:
            return f"the model reads {self.positions} and no more: shorten or split them"
        return f"data.max_length={longest} keeps all"


@dataclass(frozen=True)
class Fitted(Generic[Sample, Row]):
    """Samples with their rows, and the rows that are left out; `notices` say what was divided."""

    train: list[tuple[Sample, Row]]
    eval: list[tuple[Sample, Row]]
    left_out: list[Row]
    notices: list[str]


def fit(
    train: Sequence[Sample],
    held: Sequence[Sample],
    make: Callable[[int], Sequence[Row]],
    limit: Limit,
    too_long: TooLong,
    overlap: int = 1,
) -> Fitted[Sample, Row]:
    """The rows of the training and held-out samples in at most `limit.tokens` tokens.

    Args:
        make: tokenizes all samples, each cut to as many tokens as it is given; a row that has
            nothing to learn before the cut is left out.
        overlap: as in `divided`, where long texts are divided.

    Raises:
        InputError: a row is too long and `too_long` is `error`, or no row is left.
    """
    rows = make(WHOLE if too_long == "split" else limit.tokens)
    fitted: Fitted[Sample, Row] = Fitted([], [], [], [])
    cut = [row for row in rows if row.truncated]
    if cut and too_long == "error":
        longest = max(row.longest for row in cut)
        others = f" (and {len(cut) - 1:,} more)" if len(cut) > 1 else ""
        raise InputError(
            f"{cut[0].where}: {cut[0].longest:,} tokens{others}, more than {limit}, and "
            f"data.too_long is error: set it to cut or drop ({limit.cure(longest)})"
        )
    texts = parts = 0
    for i, (sample, row) in enumerate(zip((*train, *held), rows, strict=True)):
        several, left_out = fitting(row, limit, too_long, overlap)
        if len(several) > 1:
            texts, parts = texts + 1, parts + len(several)
        (fitted.train if i < len(train) else fitted.eval).extend((sample, part) for part in several)
        fitted.left_out.extend(left_out)
    for key, before, after in (("train", train, fitted.train), ("eval", held, fitted.eval)):
        if before and not after:
            raise _none_left(key, fitted.left_out, limit)
    if texts:
        fitted.notices.append(
            f"data.too_long: texts longer than {limit}: {texts:,}, divided into {parts:,} rows"
        )
    return fitted


def fitting(
    row: Row, limit: Limit, too_long: TooLong, overlap: int = 1
) -> tuple[list[Row], list[Row]]:
    """What a run reads of a row that was cut to its limit, or not if it is divided: kept, left out.

    Args:
        overlap: as in `divided`.

    Raises:
        InputError: the row is too long and `too_long` is `error`.
    """
    if row.truncated and too_long == "error":
        cure = limit.cure(row.longest)
        raise InputError(
            f"{row.where}: {row.longest:,} tokens, more than {limit}, and data.too_long is error: "
            f"set it to cut or drop ({cure})"
        )
    several = divided(row, limit.tokens, overlap) if too_long == "split" else [row]
    kept: list[Row] = []
    left_out: list[Row] = []
    for part in several:
        lost = part.truncated and (too_long == "drop" or part.supervised == 0)
        (left_out if lost else kept).append(part)
    return kept, left_out


def _none_left(key: str, left_out: Sequence[TokenizedRow], limit: Limit) -> InputError:
    """The error of a run whose rows are all too long; `key` is `train` or `eval`."""
    first = left_out[0]
    longest = max(row.longest for row in left_out)
    return InputError(
        f"data.{key}: all rows are left out, as they (or their answers) lie beyond {limit} (first: "
        f"{first.where}, {first.longest:,} tokens): raise data.max_length or shorten the "
        f"rows ({limit.cure(longest)})"
    )


def divided(row: Row, tokens: int, overlap: int = 1) -> list[Row]:
    """Plain text in parts of at most so many tokens; of a conversation the beginning alone.

    Args:
        overlap: each part begins with so many of the last tokens of the one before, from 1 to
            `tokens` - 1. They are read and not learned again, so that each token of the text but
            its first is predicted once.
    """
    if row.longest <= tokens:
        return [row]
    if isinstance(row, (LabelledRow, RowGroup)):
        raise InputError(
            "data.too_long split is for plain text that a causal model learns: set it to cut, drop "
            "or error"
        )
    if not all(label != IGNORE for label in row.labels[1:]):
        ids, labels = row.input_ids[:tokens], row.labels[:tokens]
        return [replace(row, input_ids=ids, labels=labels, cut=len(row) - tokens)]
    return [
        replace(
            row,
            input_ids=row.input_ids[at : at + tokens],
            labels=[IGNORE] * read + row.labels[at + read : at + tokens],
        )
        for at in range(0, len(row) - overlap, tokens - overlap)
        for read in [overlap if at else 1]
    ]
