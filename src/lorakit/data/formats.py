"""The forms that rows may have: one line here each, and what form a row has.

It is found from the columns of each row, or told by the recipe's `data.columns`. How a form is read
is in files beside this one: `supervised_rows`, `preference_rows`, `judged_rows`; `labelled` for
classifiers.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from lorakit.data.column_hints import as_yaml, means
from lorakit.data.judged_rows import JUDGED_FORMATS
from lorakit.data.other_objectives import refuse_other_objectives
from lorakit.data.preference_rows import PAIR_FORMATS
from lorakit.data.prompt_rows import PROMPT
from lorakit.data.samples import RowFormat
from lorakit.data.sources import Row
from lorakit.data.supervised_rows import (
    ALPACA,
    MESSAGES,
    PROMPT_COMPLETION,
    PROMPT_RESPONSE,
    QUESTION_ANSWER,
    SHAREGPT,
    TEXT,
)
from lorakit.data.text_files import DOCUMENT
from lorakit.errors import InputError, did_you_mean, listed

FORMATS: list[RowFormat] = [
    MESSAGES,
    ALPACA,
    PROMPT_COMPLETION,
    PROMPT_RESPONSE,
    QUESTION_ANSWER,
    SHAREGPT,
    TEXT,
    *PAIR_FORMATS,
    *JUDGED_FORMATS,
    PROMPT,
    DOCUMENT,
]
"""In the order in which messages list them; append to it to add one."""

SUPERVISED = ("conversation", "text")
"""The kinds of rows that supervised fine-tuning learns from."""


def formats_of(kinds: Collection[str]) -> list[RowFormat]:
    """The formats that an objective can use which takes rows of these kinds."""
    return [form for form in FORMATS if form.kind in kinds]


def to_sample(
    row: Row, columns: Mapping[str, str] | None = None, kinds: Collection[str] = SUPERVISED
) -> Any:
    """The sample in `row`; `columns` and `kinds` as for `recognise`.

    Raises:
        InputError: the row fits no format or several, or a value in it cannot be used.
    """
    refuse_other_objectives(row, columns or {}, kinds)
    form, row = recognise(row, columns or {}, kinds)
    return form.sample(row, asks="prompt" in kinds)


def recognise(
    row: Row, columns: Mapping[str, str], kinds: Collection[str] = SUPERVISED
) -> tuple[RowFormat, Row]:
    """The format of a row, and the row under that format's column names.

    `columns` maps a format's column to the file's own, such as
    `{"prompt": "mr", "completion": "ref"}`; it also settles which format is meant when a row
    fits several. Only formats of the `kinds` that an objective takes are looked for.

    Raises:
        InputError: the row fits no format or several.
    """
    check_columns(columns, kinds)
    row = renamed(row, columns)
    fitting = _fitting(row.values, columns, kinds)
    if not fitting:
        raise InputError(_fits_nothing(row, kinds))
    if len(fitting) > 1:
        first = fitting[0]
        example = ", ".join(f"{name}: {name}" for name in first.required)
        raise row.error(
            f"its columns fit {' and '.join(form.label for form in fitting)}; "
            f"say which is meant in the recipe, e.g. data.columns: {{{example}}}"
        )
    if fitting[0].kind == "text" and not columns and (hint := _text_and_answer(row)):
        raise InputError(hint)
    return fitting[0], row


def _fitting(
    values: Mapping[str, Any], columns: Mapping[str, str], kinds: Collection[str]
) -> list[RowFormat]:
    """The formats whose columns are all there, and that have those of the mapping.

    One whose columns are a part of those that another one needs is not among them.
    """
    found = [
        form
        for form in formats_of(kinds)
        if columns.keys() <= form.columns and all(name in values for name in form.required)
    ]
    return [
        form
        for form in found
        if not any(set(form.required) < set(other.required) for other in found)
    ]


def _text_and_answer(row: Row) -> str | None:
    """What to say of a row with a `text` and what looks like its answer (BillSum's summary)."""
    answers = [n for n, v in row.values.items() if means(n, "answer") and v and isinstance(v, str)]
    if not answers:
        return None
    return (
        f"{row.where}: it has 'text' and '{answers[0]}', so either the text is learned or an "
        "answer to it; say which is meant in the recipe, data.columns: {text: text} or "
        f"data.columns: {as_yaml({'prompt': 'text', 'completion': answers[0]})}"
    )


def check_columns(columns: Mapping[str, str], kinds: Collection[str] = SUPERVISED) -> None:
    """Refuses a `data.columns` mapping that no format could use.

    Raises:
        InputError: a key is no known column, or the keys belong to different formats.
    """
    forms = formats_of(kinds)
    known = list(dict.fromkeys(c for form in forms for c in (*form.required, *form.optional)))
    for name in columns:
        if name not in known:
            raise InputError(
                f"data.columns: '{name}' is not a column of any format"
                f"{did_you_mean(name, known)}; known are {', '.join(known)}"
            )
    if not any(columns.keys() <= form.columns for form in forms):
        raise InputError(
            f"data.columns: no format has all of {', '.join(columns)}; accepted are "
            f"{_labels(kinds)}"
        )


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under the format's column names; a column that was renamed loses its own name."""
    for name, own in columns.items():
        if own not in row.values:
            raise row.error(
                f"no column '{own}', to which data.columns maps '{name}'"
                f"{did_you_mean(own, row.values)}; correct it, the row has {listed(row.values)}"
            )
    taken = set(columns.values())
    values = {name: value for name, value in row.values.items() if name not in taken}
    values |= {name: row.values[own] for name, own in columns.items()}
    return dataclasses.replace(row, values=values)


def proposed(
    values: Mapping[str, object], kinds: Collection[str] = SUPERVISED
) -> dict[str, str] | None:
    """A `data.columns` for a row with these columns; None where its meaning is not clear."""
    return next(filter(None, (form.propose(values) for form in formats_of(kinds))), None)


def _fits_nothing(row: Row, kinds: Collection[str]) -> str:
    own = list(row.values)
    hint = proposed(row.values, kinds)
    if hint and _can_be_read(renamed(row, hint), hint, kinds):
        example = f"e.g. data.columns: {as_yaml(hint)}"
    elif "conversation" not in kinds:
        first = formats_of(kinds)[0].required
        example = f"as data.columns: {as_yaml({name: f'YOUR_{name.upper()}' for name in first})}"
    elif len(own) == 1:
        example = f"e.g. data.columns: {as_yaml({'text': own[0]})}"
    else:
        example = "as data.columns: {prompt: YOUR_QUESTIONS, completion: YOUR_ANSWERS}"
    return (
        f"{row.where}: its columns ({listed(map(_shown, own)) or 'none'}) fit no format; accepted "
        f"are {_labels(kinds)}; name yours in the recipe, {example} (lorakit eval: --columns)"
    )


def _can_be_read(row: Row, columns: Mapping[str, str], kinds: Collection[str]) -> bool:
    """Whether a sample comes out of this row, which has the columns' names already."""
    fitting = _fitting(row.values, columns, kinds)
    try:
        return len(fitting) == 1 and bool(fitting[0].sample(row))
    except InputError:
        return False


def _shown(name: str) -> str:
    """A column's name, in quotes where white space would not be seen."""
    return name if name == name.strip() and name else repr(name)


def _labels(kinds: Collection[str]) -> str:
    return ", ".join(form.label for form in formats_of(kinds))
