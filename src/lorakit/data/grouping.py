"""Which rows make a batch, and in which order batches come: a plan for each epoch.

The seed and the epoch alone decide a plan, so a run that goes on after an interruption finds the
same one. All plans of a run have the same number of batches, so the number of steps is known
before the first, and each row stands in a plan once.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

LIKE_LENGTHS = 50
"""Batches whose rows are sorted by length together: enough to save padding, few enough to shuffle.
"""

GRAIN = 8
"""Tokens: lengths that differ by less count as equal, so that epochs differ in who meets whom."""

AT_ONCE = 4096
"""Tokens of a pass without gradients: two cores are no faster with more (docs/performance.md)."""

Batches = list[list[int]]
"""The positions of each batch's rows."""


def by_rows(count: int, size: int, seed: int, epoch: int) -> Batches:
    """Batches of `size` rows in random order; the last one may have fewer."""
    order = list(range(count))
    _random(seed, epoch).shuffle(order)
    return cut(order, size)


def by_like_lengths(
    lengths: Sequence[int], size: int, seed: int, epoch: int, together: int = 1
) -> Batches:
    """Batches of `size` rows of like length, so that little is padded.

    A random permutation is cut into groups of `LIKE_LENGTHS` steps, each group is sorted, and all
    steps are shuffled.

    Args:
        together: batches that make one optimiser step, whose rows are all of like length.
    """
    shuffle = _random(seed, epoch).shuffle
    order = list(range(len(lengths)))
    shuffle(order)
    # The incomplete step is set aside first: it must come last, or it would shift all others.
    rows = size * together
    full = len(order) - len(order) % rows
    order, rest = order[:full], order[full:]
    steps = []
    for group in cut(order, LIKE_LENGTHS * rows):
        steps += cut(sorted(group, key=lengths.__getitem__), rows)
    shuffle(steps)
    return [batch for step in (*steps, rest) for batch in cut(step, size)]


def by_tokens(lengths: Sequence[int], budget: int, seed: int, epoch: int) -> Batches:
    """Batches of at most `budget` tokens by best fit, in random order.

    The longest rows are placed first, each into the fullest batch that it still fits (best-fit
    decreasing; Johnson et al. 1974). How many batches that makes depends on the lengths alone,
    while rows of equal length change places from epoch to epoch. A row that is longer than the
    budget has a batch to itself.
    """
    shuffle = _random(seed, epoch).shuffle
    batches: Batches = []
    with_room: dict[int, Batches] = {}  # by the grains that they still take
    rooms: list[int] = []  # the keys of with_room, sorted
    for index, grains, capacity in _longest_first(lengths, budget, shuffle):
        at = bisect_left(rooms, grains)
        if at == len(rooms):
            batch, room = [index], capacity - grains
            batches.append(batch)
        else:
            room = rooms[at]
            batch = with_room[room].pop()
            batch.append(index)
            if not with_room[room]:
                del with_room[room], rooms[at]
            room -= grains
        if room not in with_room:
            with_room[room] = []
            insort(rooms, room)
        with_room[room].append(batch)
    shuffle(batches)
    return batches


def by_padded_tokens(lengths: Sequence[int], budget: int, seed: int, epoch: int) -> Batches:
    """Batches whose rows, padded to the longest of them, have at most `budget` tokens.

    Rows of like length share a batch; a row that is longer than the budget has one to itself.
    """
    shuffle = _random(seed, epoch).shuffle
    batches: Batches = []
    width = 0
    for index, grains, capacity in _longest_first(lengths, budget, shuffle):
        if not batches or (len(batches[-1]) + 1) * width > capacity:
            batches.append([])
            width = grains
        batches[-1].append(index)
    shuffle(batches)
    return batches


def by_beginning(rows: Sequence[list[int]], size: int | None) -> Batches:
    """Batches of rows that begin alike, for one line each.

    Args:
        size: rows of a batch; None for as many as have `AT_ONCE` tokens.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return _largest_first(order, [len(row) for row in rows], size)


def by_length(lengths: Sequence[int], size: int | None) -> Batches:
    """Batches of rows of like length; `size` as in `by_beginning`."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return _largest_first(order, lengths, size)


def _largest_first(order: list[int], lengths: Sequence[int], size: int | None) -> Batches:
    """`order` in batches, so that memory that is enough for the first is enough for all."""
    if size is not None:
        batches = cut(order, size)
    else:
        batches, tokens = [], AT_ONCE
        for i in order:
            tokens += lengths[i]
            if tokens > AT_ONCE:
                batches.append([])
                tokens = lengths[i]
            batches[-1].append(i)
    return sorted(batches, key=lambda batch: sum(lengths[i] for i in batch), reverse=True)


def evened(batches: Batches, multiple: int) -> Batches:
    """Halves the last batches until their number is a multiple of `multiple`.

    So that several processes have the same number and no row is seen twice; with fewer rows than
    that there is nothing left to halve. The last ones, so that the steps before stay as they are.
    """
    batches = list(batches)
    while len(batches) % multiple:
        at = next((i for i in reversed(range(len(batches))) if len(batches[i]) > 1), None)
        if at is None:
            break
        batch = batches[at]
        middle = len(batch) // 2
        batches[at : at + 1] = [batch[:middle], batch[middle:]]
    return batches


def _longest_first(
    lengths: Sequence[int], budget: int, shuffle: Callable[[list[int]], None]
) -> list[tuple[int, int, int]]:
    """(position, length in grains, budget in grains) of all rows, equal lengths in random order."""
    capacity = max(1, budget // GRAIN)
    order = list(range(len(lengths)))
    shuffle(order)
    grains = [min(-(-length // GRAIN), capacity) for length in lengths]
    order.sort(key=grains.__getitem__, reverse=True)
    return [(index, grains[index], capacity) for index in order]


def cut(order: list[int], size: int) -> Batches:
    """`order` in batches of `size`; the last one may have fewer."""
    return [order[at : at + size] for at in range(0, len(order), size)]


def _random(seed: int, epoch: int) -> random.Random:
    return random.Random(f"{seed}/{epoch}")
