"""Rows with labels: a class for a text or a pair of texts, or a tag for every word.

Here rows become samples, labels get their numbers, and some rows are held out. How a sample becomes
tokens is `lorakit.data.label_rows`' work, how predictions are scored `lorakit.data.scores`'.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.data.conversations import kind_of_value, list_of, string
from lorakit.data.formats import FORMATS, recognise
from lorakit.data.samples import RowFormat
from lorakit.data.sources import Row, read_rows
from lorakit.data.splits import MEASURED, held_out, shuffled_groups
from lorakit.errors import InputError, did_you_mean, each, listed

Label = str | int | bool

_POINT = re.compile(r"[-+]?\d*\.\d+")
_MANY = 1000  # classes, from which a column of labels looks like something else


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """What one row teaches: `texts` is one text or a pair with one label, or words with a tag each.

    `labels` are as the file has them; `label_name` gives their names. There are no `messages`.
    """

    texts: tuple[str, ...]
    labels: tuple[Label, ...]
    where: str
    messages: tuple[()] = ()

    @property
    def prompt_key(self) -> str:
        """Equal for samples with the same text, as that of conversations."""
        return json.dumps(self.texts, ensure_ascii=False)

    @property
    def reference(self) -> str:
        """The labels."""
        return " ".join(map(label_name, self.labels))


@dataclass(frozen=True, slots=True)
class Labels:
    """The classes of a task: their names, whose places are their numbers, and their counts."""

    names: tuple[str, ...]
    counts: dict[str, int]

    @property
    def number_of(self) -> dict[str, int]:
        """The number of each name (`label2id`)."""
        return {name: i for i, name in enumerate(self.names)}

    def to_dict(self) -> dict[str, Any]:
        """For an adapter's manifest: transformers' `id2label` and `label2id`, and the counts."""
        names = {str(i): name for i, name in enumerate(self.names)}
        return {"id2label": names, "label2id": self.number_of, "counts": self.counts}


def read_labelled(
    rows: str | Path | Iterable[Row],
    task_type: str,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[LabelledSample]:
    """The samples of a source or of its rows, at most the first `limit`, through `columns`.

    Args:
        rows: what is to be measured on (of a data set in parts, test), or rows.
        task_type: `SEQ_CLS` for a label a row, `TOKEN_CLS` for a tag a word.

    Raises:
        InputError: the file, `columns`, or a row of it cannot be used.
    """
    if isinstance(rows, (str, Path)):
        rows = read_rows(rows, wanted=MEASURED)

    def read(row: Row) -> LabelledSample:
        form, row = recognise(row, columns or {}, (task_type,))
        found: LabelledSample = form.sample(row)
        return found

    return each(islice(rows, limit), read)


def _read_sequence(row: Row, names: tuple[str, ...]) -> LabelledSample:
    if row.values.get("text_pair") is not None and "text" in names:
        names += ("text_pair",)
    texts = tuple(string(row, row.values[name], f"'{name}'", empty=False) for name in names)
    return LabelledSample(texts, (_label(row, row.values["label"], "'label'"),), row.where)


def _read_words(row: Row, column: str) -> LabelledSample:
    words, tags = (
        list_of(row, row.values[name], f"'{name}'", "one value per word")
        for name in ("tokens", column)
    )
    if len(words) != len(tags):
        raise row.error(
            f"{len(words)} tokens and {len(tags)} {column}: every word needs one tag; repair or "
            "drop the row"
        )
    if not words:
        raise row.error("'tokens' is empty; fill it or drop the row")
    return LabelledSample(
        tuple(string(row, word, f"tokens[{i}]", empty=False) for i, word in enumerate(words)),
        tuple(_label(row, tag, f"{column}[{i}]") for i, tag in enumerate(tags)),
        row.where,
    )


def _label(row: Row, value: object, what: str) -> Label:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise row.error(f"{what} is empty; give the row a label or drop it")
    if isinstance(value, float):
        raise row.error(
            f"{what} is {value}, a number with a point, and labels are classes: "
            "write whole numbers or names (regression is not supported)"
        )
    if not isinstance(value, (str, int)):
        raise row.error(f"{what} is {kind_of_value(value)}, expected a name or a whole number")
    return value


FORMATS.extend(
    RowFormat((*texts, "label"), partial(_read_sequence, names=texts), optional, kind="SEQ_CLS")
    for texts, optional in ((("text",), ("text_pair",)), (("sentence1", "sentence2"), ()))
)
FORMATS.extend(
    RowFormat(("tokens", tags), partial(_read_words, column=tags), (), kind="TOKEN_CLS")
    for tags in ("tags", "ner_tags")
)


def label_name(label: Label) -> str:
    """A label as text: `7` for 7, `true` for True."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def collect_labels(train: Sequence[LabelledSample], held: Sequence[LabelledSample]) -> Labels:
    """The labels of the training rows, numbers by size and names by alphabet.

    Raises:
        InputError: there is only one, the held-out rows have another, or labels are of two kinds.
    """
    kinds: dict[str, LabelledSample] = {}
    for sample in (*train, *held):
        for label in sample.labels:
            kinds.setdefault(kind_of_value(label), sample)
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise InputError(
            f"{second.where}: a label is {other}, and in {first.where} {one}; "
            "write all of them the same way"
        )
    counts = count_labels(train)
    names = sorted(counts, key=_by_size_or_name(counts))
    if len(names) < 2:
        raise InputError(
            f"{train[0].where}: all training rows have the label '{names[0]}', so there is nothing "
            "to tell apart; give rows of at least two labels, or check data.columns"
        )
    check_labels(held, names)
    return Labels(tuple(names), {name: counts[name] for name in names})


def count_labels(samples: Iterable[LabelledSample]) -> Counter[str]:
    """How many rows, or words, have each label."""
    return Counter(label_name(label) for sample in samples for label in sample.labels)


def _by_size_or_name(names: Mapping[str, int]) -> Any:
    try:
        numbers = {name: int(name) for name in names}
    except ValueError:
        return str
    return numbers.__getitem__


def check_labels(samples: Sequence[LabelledSample], names: Sequence[str]) -> None:
    """Raises InputError for a label that is not among `names`, the training rows'."""
    known = set(names)
    for sample in samples:
        for label in map(label_name, sample.labels):
            if label not in known:
                raise InputError(
                    f"{sample.where}: no training row has the label '{label[:60]}'"
                    f"{did_you_mean(label, names)}; there are {listed(names)}"
                )


def notice_labels(labels: Labels, rows: int) -> list[str]:
    """What the labels are, and a warning of such as are hardly meant as classes."""
    counts = sorted(labels.counts.items(), key=lambda item: -item[1])
    notices = [f"{len(counts)} labels: {listed((f'{n} ({c:,})' for n, c in counts), 8)}"]
    if len(counts) >= _MANY or (len(counts) > 20 and 2 * len(counts) > rows):
        notices.append(
            f"{len(counts):,} different labels in {rows:,} rows: is this a column of numbers or "
            "free text? Check data.columns, lorakit learns classes"
        )
    elif any(_POINT.fullmatch(name) for name in labels.names):
        notices.append("labels are numbers with a point: each is learned as a class of its own")
    alike: dict[str, list[str]] = {}
    for name in labels.names:
        alike.setdefault(name.strip().casefold(), []).append(name)
    notices += [
        f"labels that differ in case or white space alone: {listed(map(repr, same))}"
        for same in alike.values()
        if len(same) > 1
    ]
    return notices


def hold_out(
    samples: list[LabelledSample], share: float, seed: int
) -> tuple[list[LabelledSample], list[LabelledSample], list[str]]:
    """Training samples, about `share` of them held out, and a notice.

    Rows with the same text stay together, and every label keeps a row to learn from.

    Raises:
        InputError: no row can be held out so.
    """
    if share == 0:
        return samples, [], []
    left = Counter(label for sample in samples for label in set(sample.labels))

    def spared(group: list[int]) -> bool:
        taken = Counter(label for i in group for label in set(samples[i].labels))
        spare = all(left[label] > number for label, number in taken.items())
        if spare:
            left.subtract(taken)
        return spare

    groups = shuffled_groups([sample.prompt_key for sample in samples], seed)
    held = held_out(groups, share, spared)
    if not held:
        raise InputError(
            f"data.eval: of {len(samples)} rows none can be held out, as every label needs a row "
            "to learn from; add rows, give a file, or set data.eval to 0"
        )
    return (
        [sample for i, sample in enumerate(samples) if i not in held],
        [sample for i, sample in enumerate(samples) if i in held],
        [f"eval: {len(held):,} of {len(samples):,} rows held out (seed {seed})"],
    )
