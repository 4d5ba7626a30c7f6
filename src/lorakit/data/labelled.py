"""Rows with labels: a class for a text or a pair of texts, or a tag for every word.

The columns are recognised by their names, or told by the recipe's `data.columns`. Here rows become
samples, labels get their numbers, some rows are held out, and a sample becomes tokens; what a
model makes of them is scored in `lorakit.data.scores`.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.data.masking import TokenizedRow
from lorakit.data.sources import Row, read_rows
from lorakit.errors import InputError, did_you_mean, listed
from lorakit.models.loss import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Label = str | int | bool

# For each task the forms that a row may have: the required columns, the last one with labels.
_FORMS = {
    "SEQ_CLS": (("text", "label"), ("sentence1", "sentence2", "label")),
    "TOKEN_CLS": (("tokens", "tags"), ("tokens", "ner_tags")),
}
_OPTIONAL = {("text", "label"): "text_pair"}
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
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
class LabelledRow(TokenizedRow):
    """A row ready for training: `labels` are one class, one a token (or `IGNORE`), or a target's.

    `segments` tell the two texts of a pair apart, for models that want it (`token_type_ids`).
    `words` are the places of the words whose tags are among the labels, `unseen` the number of
    words without a token.
    """

    segments: list[int] | None = None
    words: tuple[int, ...] = ()
    unseen: int = 0

    @property
    def supervised(self) -> int:
        """Labels that the loss is taken on."""
        return sum(label != IGNORE for label in self.labels)


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
    path: str | Path,
    task_type: str,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[LabelledSample]:
    """The samples of a file, at most the first `limit`, through the mapping `columns`.

    Args:
        task_type: `SEQ_CLS` for a label a row, `TOKEN_CLS` for a tag a word.

    Raises:
        InputError: the file, `columns`, or a row of it cannot be used.
    """
    columns = columns or {}
    known = list(dict.fromkeys(c for f in _FORMS[task_type] for c in (*f, *_optional(f))))
    for name in columns:
        if name not in known:
            raise InputError(
                f"data.columns: '{name}' is not a column of {task_type}"
                f"{did_you_mean(name, known)}; known are {', '.join(known)}"
            )
    read = _read_sequence if task_type == "SEQ_CLS" else _read_words
    return [read(*_columns(row, task_type, columns)) for row in read_rows(path)[:limit]]


def _optional(form: tuple[str, ...]) -> tuple[str, ...]:
    return (_OPTIONAL[form],) if form in _OPTIONAL else ()


def _columns(row: Row, task_type: str, columns: Mapping[str, str]) -> tuple[Row, tuple[str, ...]]:
    """The row under the names of the form that it has, and that form."""
    for name, own in columns.items():
        if own not in row.values:
            raise InputError(
                f"{row.where}: no column '{own}', which data.columns gives for '{name}'"
                f"{did_you_mean(own, row.values)}; the row has {listed(row.values)}"
            )
    values = {name: v for name, v in row.values.items() if name not in columns.values()}
    values |= {name: row.values[own] for name, own in columns.items()}
    forms = _FORMS[task_type]
    fitting = [
        form
        for form in forms
        if all(name in values for name in form) and columns.keys() <= {*form, *_optional(form)}
    ]
    if len(fitting) == 1:
        return Row(values, row.path, row.line), fitting[0]
    accepted = " or ".join("+".join(form) for form in forms)
    if fitting:
        [first, *_] = fitting
        example = ", ".join(f"{name}: {name}" for name in first)
        raise InputError(
            f"{row.where}: its columns fit {accepted}; say which is meant, "
            f"e.g. data.columns: {{{example}}}"
        )
    example = ", ".join(f"{name}: your_{name}" for name in forms[0])
    raise InputError(
        f"{row.where}: its columns ({listed(row.values) or 'none'}) are not those of {task_type}, "
        f"{accepted}; name yours in the recipe, e.g. data.columns: {{{example}}} "
        "(lorakit eval: --columns)"
    )


def _read_sequence(row: Row, form: tuple[str, ...]) -> LabelledSample:
    *names, label = form
    names += [name for name in _optional(form) if row.values.get(name) is not None]
    texts = tuple(_text(row, row.values[name], f"'{name}'") for name in names)
    return LabelledSample(texts, (_label(row, row.values[label], f"'{label}'"),), row.where)


def _read_words(row: Row, form: tuple[str, ...]) -> LabelledSample:
    words, tags = (row.values[name] for name in form)
    for name in form:
        if not isinstance(row.values[name], list):
            kind = _kind(row.values[name])
            raise InputError(f"{row.where}: '{name}' is {kind}, expected a list with one a word")
    if len(words) != len(tags):
        raise InputError(
            f"{row.where}: {len(words)} {form[0]} and {len(tags)} {form[1]}: every word needs "
            "one tag; repair or drop the row"
        )
    if not words:
        raise InputError(f"{row.where}: '{form[0]}' is empty; fill it or drop the row")
    return LabelledSample(
        tuple(_text(row, word, f"{form[0]}[{i}]") for i, word in enumerate(words)),
        tuple(_label(row, tag, f"{form[1]}[{i}]") for i, tag in enumerate(tags)),
        row.where,
    )


def _text(row: Row, value: object, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{row.where}: {what} is {_kind(value)}, expected a string")
    if not value.strip():
        raise InputError(f"{row.where}: {what} is empty; fill it or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud83d" alone in JSON; tokenizers cannot take it
        raise InputError(
            f"{row.where}: {what} holds half of a surrogate pair; repair it"
        ) from error
    return value


def _kind(value: object) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _label(row: Row, value: object, what: str) -> Label:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{row.where}: {what} is empty; give the row a label or drop it")
    if isinstance(value, float):
        raise InputError(
            f"{row.where}: {what} is {value}, a number with a point, and labels are classes: "
            "write whole numbers or names (lorakit does not learn to predict numbers)"
        )
    if not isinstance(value, (str, int)):
        raise InputError(
            f"{row.where}: {what} is {_kind(value)}, expected a name or a whole number"
        )
    return value


def label_name(label: Label) -> str:
    """A label as text: `7` for 7, `true` for True."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def collect_labels(train: Sequence[LabelledSample], held: Sequence[LabelledSample]) -> Labels:
    """The labels of the training rows, numbers by size and names by alphabet.

    Raises:
        InputError: there is only one, the held-out rows have another, or labels are of two kinds.
    """
    kinds: dict[type, LabelledSample] = {}
    for sample in (*train, *held):
        for label in sample.labels:
            kinds.setdefault(type(label), sample)
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise InputError(
            f"{second.where}: a label is {_KINDS[other]}, and in {first.where} {_KINDS[one]}; "
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
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.texts, []).append(i)
    left = Counter(label for sample in samples for label in set(sample.labels))
    wanted = min(max(1, round(share * len(samples))), len(samples) - 1)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    for group in order:
        taken = Counter(label for i in group for label in set(samples[i].labels))
        if len(held) + len(group) <= wanted and all(left[x] > n for x, n in taken.items()):
            held.update(group)
            left -= taken
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


def tokenize_sequence(
    sample: LabelledSample,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    number_of: Mapping[str, int],
) -> LabelledRow:
    """A text or a pair as the model reads it, and its class; the longer text is cut first."""
    encoded = tokenizer(*sample.texts, return_attention_mask=False, verbose=False)
    cut = max(0, len(encoded["input_ids"]) - max_length)
    if cut:
        encoded = tokenizer(
            *sample.texts, return_attention_mask=False, truncation=True, max_length=max_length
        )
    segments = encoded.get("token_type_ids")
    label = number_of[label_name(sample.labels[0])]
    ids = list(encoded["input_ids"])
    return LabelledRow(ids, [label], sample.where, cut, segments=segments)


def tokenize_words(
    sample: LabelledSample,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    number_of: Mapping[str, int],
) -> LabelledRow:
    """Words as the model reads them; a word's tag is that of its first token, others have none.

    Words stand as in a text, with a space between them where the tokenizer's tokens have it.

    Raises:
        InputError: no word has a token.
    """
    first, *others = sample.texts
    space = _space_between(tokenizer)
    words = [first, *(space + word for word in others)]
    options = {"is_split_into_words": True, "return_attention_mask": False}
    encoded = tokenizer(words, verbose=False, **options)
    whole = {word for word in encoded.word_ids() if word is not None}
    cut = max(0, len(encoded["input_ids"]) - max_length)
    if cut:
        encoded = tokenizer(words, truncation=True, max_length=max_length, **options)
    labels, seen = [], []
    before = None
    for word in encoded.word_ids():
        if word is None or word == before:
            labels.append(IGNORE)
        else:
            labels.append(number_of[label_name(sample.labels[word])])
            seen.append(word)
        before = word
    if not seen:
        raise InputError(f"{sample.where}: no word has a token; repair or drop the row")
    return LabelledRow(
        list(encoded["input_ids"]),
        labels,
        sample.where,
        cut,
        segments=encoded.get("token_type_ids"),
        words=tuple(seen),
        unseen=len(words) - len(whole),
    )


def _space_between(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A space where a word that follows another has other tokens than a word alone, else nothing.

    A byte-level tokenizer writes the space into the token; given words, it would glue them.
    """
    alone = tokenizer.tokenize("b")
    return "" if tokenizer.tokenize("b b") == alone + alone else " "


def notice_unseen(rows: Sequence[LabelledRow]) -> list[str]:
    """How many words have no token, and where the first one is."""
    unseen = [row for row in rows if row.unseen]
    if not unseen:
        return []
    return [
        f"{sum(row.unseen for row in unseen):,} words have no token, so that their tags are "
        f"neither learned nor scored (first: {unseen[0].where})"
    ]
