"""Rows that begin alike: what they have in common is computed once.

Under a chat template every row begins with the same system prompt, and several answers to one
prompt have all of it in common. A causal model computes the same there for all of them, so their
batch becomes a tree: a shared prefix is a segment of its own, and the rows go on behind it. What
the loss is taken on stays in each row, with the token before, whose output predicts it; the
gradients of all rows meet in the keys and values of their prefix. Pictures are shared where rows
begin with the same ones, all of each row's.
"""

from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import NamedTuple

from lorakit.data.masking import IGNORE, TokenizedRow

WORTH = 16
"""Tokens that a shared prefix saves at least: a segment more costs each layer a few small calls."""


class Segment(NamedTuple):
    """Tokens [begin, end) of `rows[row]`, behind those of the segment `parent`; None: a beginning.

    A parent ends where its children begin.
    """

    row: int
    begin: int
    end: int
    parent: int | None


def in_segments(rows: Sequence[TokenizedRow]) -> list[Segment]:
    """`rows` as segments that together hold every prefix worth sharing once.

    The ends of the rows come in the order of `rows`, each prefix before the first that needs it.
    """
    shown: dict[Hashable, int] = {}
    heads = [_head(row, shown) for row in rows]
    # Of each row, where its prefixes end, and by which row each is known, the outermost first.
    cuts: list[list[tuple[int, int]]] = [[] for _ in rows]
    # Sorted, what any rows have in common is what the first and the last of them have.
    groups = [(sorted(range(len(rows)), key=heads.__getitem__), 0)]
    while groups:
        group, begin = groups.pop()
        common = _common(heads[group[0]], heads[group[-1]])
        if (len(group) - 1) * (common - begin) >= WORTH:
            for i in group:
                cuts[i].append((common, group[0]))
            begin = common

        def next_token(i: int, at: int = common) -> int:
            return heads[i][at] if at < len(heads[i]) else -1

        for token, several in groupby(group, next_token):
            # Those that have nothing of their own before the loss begins are told apart no further.
            if token != -1 and len(further := list(several)) > 1:
                groups.append((further, begin))
    return _laid_out(rows, cuts)


def _laid_out(
    rows: Sequence[TokenizedRow], cuts: Sequence[Sequence[tuple[int, int]]]
) -> list[Segment]:
    segments: list[Segment] = []
    places: dict[tuple[int, int], int] = {}  # of prefixes, by where they end and the row
    for i, row in enumerate(rows):
        begin, parent = 0, None
        for end, owner in cuts[i]:
            if (end, owner) not in places:
                places[end, owner] = len(segments)
                segments.append(Segment(i, begin, end, parent))
            begin, parent = end, places[end, owner]
        segments.append(Segment(i, begin, len(row), parent))
    return segments


def _head(row: TokenizedRow, shown: dict[Hashable, int]) -> list[int]:
    """What of `row` may be shared: all before the token whose output is first learned from.

    Other pictures have the same tokens. In the place of these stands a number for all that the row
    shows and says up to its last picture, so that rows have all of their pictures in common or
    none; where what is shared ends among the pictures, it ends before the first.

    Args:
        shown: the numbers so far.
    """
    first = next((t for t, x in enumerate(row.labels) if t and x != IGNORE), len(row))
    head = row.input_ids[: max(0, first - 1)]
    if row.pictures is None or not (placed := row.pictures.placed):
        return head
    if (last := placed[-1].end) > len(head):
        return head[: placed[0].begin]
    number = shown.setdefault((placed, tuple(head[:last])), len(shown))
    head = [*head]
    for one in placed:
        head[one.begin : one.end] = [-2 - number] * (one.end - one.begin)  # -1 is an end
    return head


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(a), len(b))
    return next((t for t in range(shorter) if a[t] != b[t]), shorter)
