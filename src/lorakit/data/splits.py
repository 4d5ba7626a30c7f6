"""Which part of a data set a file or a split holds, by its name: train, validation or test.

Names are divided as the library `datasets` does it: `train-00001.parquet`, `orders_dev.jsonl`,
`test_sft`. What is for training is never mixed with what is for measuring.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence

from lorakit.errors import listed, one_line

SPLITS = {
    "train": "train training 训练 训练集",
    "validation": "validation valid val dev heldout held_out holdout 验证 验证集",
    "test": "test testing eval evaluation 测试 测试集",
}
"""The words that name each part, between other characters than letters."""

LEARNED = ("train",)
"""What training reads of a data set in parts."""

HELD_OUT = ("validation", "test")
"""What measuring during training reads: the first of them that there is."""

MEASURED = ("test", "validation")
"""What measuring afterwards reads."""

_WORDS = {
    split: re.compile(rf"(?<![^\W\d_])({'|'.join(words.split())})(?![^\W\d_])")
    for split, words in SPLITS.items()
}


def split_of(name: str) -> str | None:
    """`train`, `validation` or `test`; None for a name that says none of them, or several."""
    found = [split for split, words in _WORDS.items() if words.search(name.lower())]
    return found[0] if len(found) == 1 else None


def by_split(names: Iterable[str]) -> dict[str | None, list[str]]:
    """The names of each part, in their order; under None those that say none."""
    parts: dict[str | None, list[str]] = {}
    for name in names:
        parts.setdefault(split_of(name), []).append(name)
    return parts


def notice_of_parts(
    place: object, parts: dict[str | None, list[str]], chosen: str | None
) -> list[str]:
    """What to say of the parts that are not read, if there are any."""
    left = [name for split, names in parts.items() if split != chosen for name in names]
    if not left:
        return []
    what = f"its {chosen} part is read" if chosen else "what is named for no part is read"
    return [f"{place}: {what}, left out are {one_line(listed(left, 5))}"]


def shuffled_groups(keys: Sequence[str], seed: int) -> list[list[int]]:
    """The positions of rows with the same key together, the groups in an order of the seed's."""
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    return order


def held_out(
    groups: Sequence[list[int]],
    share: float,
    take: Callable[[list[int]], bool] = lambda group: True,
) -> set[int]:
    """Positions of at most `share` of the rows, but one at least, in whole groups.

    A group that is larger than what is left of the share is passed over: one prompt with many rows
    must not empty the training side.

    Args:
        take: whether a group that fits may be held out.
    """
    rows = sum(map(len, groups))
    wanted = min(max(1, round(share * rows)), rows - 1)
    held: set[int] = set()
    for group in groups:
        if len(held) + len(group) <= wanted and take(group):
            held.update(group)
    return held
