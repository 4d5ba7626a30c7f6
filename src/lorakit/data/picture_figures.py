"""Pictures of tokenized rows in numbers: how many, how large, and what they cost in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from lorakit.data.masking import TokenizedRow, sequences_of
from lorakit.data.thumbnails import pixel_size
from lorakit.progress import track

Size = tuple[int, int]


@dataclass(frozen=True)
class PictureFigures:
    """Pictures that rows show.

    Attributes:
        rows: how many have one.
        pictures: how many they show; a pair's two sequences show theirs once each.
        files: how many different ones these are.
        tokens: of a picture: the fewest, the median, the most.
        share: tokens of pictures, of all tokens of all rows.
        sizes: width and height in pixels of the smallest one, of the median, of the largest.
    """

    rows: int
    pictures: int
    files: int
    tokens: tuple[int, int, int]
    share: float
    sizes: tuple[Size, Size, Size]


def picture_figures(rows: Sequence[TokenizedRow]) -> PictureFigures | None:
    """The numbers of the pictures in rows; None where there are none.

    Raises:
        InputError: a picture cannot be read any more.
    """
    having = [r for r in rows if any(s.pictures and s.pictures.placed for s in r.sequences)]
    placed = [one for row in sequences_of(having) if row.pictures for one in row.pictures.placed]
    if not placed:
        return None
    different = list({one.source: None for one in placed})
    by_source = {s: pixel_size(s) for s in track(different, "measuring pictures")}
    sizes = sorted(by_source.values(), key=lambda size: size[0] * size[1])
    tokens = sorted(one.end - one.begin for one in placed)
    return PictureFigures(
        len(having),
        len(placed),
        len(different),
        (tokens[0], median_low(tokens), tokens[-1]),
        sum(tokens) / sum(len(row) for row in sequences_of(rows)),
        (sizes[0], sizes[(len(sizes) - 1) // 2], sizes[-1]),
    )
