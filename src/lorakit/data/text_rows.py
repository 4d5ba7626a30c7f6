"""Rows of plain text, all of which is learned."""

from collections.abc import Mapping

from lorakit.data.column_hints import means, named_for
from lorakit.data.conversations import string
from lorakit.data.samples import RowFormat
from lorakit.data.sources import Row


def _read(row: Row) -> str:
    return string(row, row.values["text"], "'text'", empty=False)


def _proposed(values: Mapping[str, object]) -> dict[str, str] | None:
    strings = [name for name, value in values.items() if isinstance(value, str)]
    alone = len(strings) == 1 and means(strings[0], "text") and not named_for(strings, "answer")
    return {"text": strings[0]} if alone else None


TEXT = RowFormat(("text",), _read, (), "text", _proposed)
