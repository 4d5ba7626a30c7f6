"""Which part of a data set a file or a split holds, by its name: train, validation or test.

Names are divided as the library `datasets` does it: `train-00001.parquet`, `orders_dev.jsonl`,
`test_sft`. What is for training is never mixed with what is for measuring.
"""

import re
from collections.abc import Iterable, Sequence

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


def chosen_split(parts: dict[str | None, list[str]], wanted: Sequence[str]) -> str | None:
    """The first wanted part that there is, or else None, for what says no part.

    Raises:
        KeyError: there is neither.
    """
    for split in (*wanted, None):
        if split in parts:
            return split
    raise KeyError


def notice_of_parts(
    place: object, parts: dict[str | None, list[str]], chosen: str | None
) -> list[str]:
    """What to say of the parts that are not read, if there are any."""
    left = [name for split, names in parts.items() if split != chosen for name in names]
    if not left:
        return []
    what = f"its {chosen} part is read" if chosen else "what is named for no part is read"
    return [f"{place}: {what}, left out are {one_line(listed(left, 5))}"]
