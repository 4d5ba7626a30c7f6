"""Plain text files to documents: a file, a line or a paragraph each.

The names are those of the text loader of the library `datasets` (`sample_by`). Where a recipe does
not choose, it is found by looking at the file, and said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Literal

from lorakit.data.column_hints import named_for
from lorakit.data.samples import RowFormat, Sample
from lorakit.data.sources import Row
from lorakit.errors import count

SampleBy = Literal["auto", "line", "paragraph", "document"]
"""What a document of a text file is: a line, lines between blank ones, or the whole file."""

_WRAPPED = 120
"""Characters: lines of running text that an editor breaks are shorter."""

_WORDS = {
    "line": "one a line",
    "paragraph": "separated by blank lines",
    "document": "a file each",
}


def _read(row: Row) -> Sample:
    text = row.values["document"]
    if not isinstance(text, str) or not text.strip():
        raise row.error(f"'document' is {json.dumps(text)[:40]}, expected a text that is not empty")
    return Sample((), text.replace("\r\n", "\n"), row.where)


def _proposed(values: Mapping[str, object]) -> dict[str, str] | None:
    """The only text of a row, or the only one that is called so."""
    strings = [name for name, value in values.items() if isinstance(value, str)]
    texts = strings if len(strings) == 1 else named_for(strings, "text")
    return {"document": texts[0]} if len(texts) == 1 else None


DOCUMENT = RowFormat(("document",), _read, (), "document", _proposed)
"""A document of a text file; a column of that name is read alike."""


def divided(rows: Sequence[Row], sample_by: SampleBy = "auto") -> tuple[list[Row], list[str]]:
    """The documents of text files, and what to say of how they were told apart.

    Args:
        rows: of one source; those of other files than plain text stay as they are.
        sample_by: what a document is; `auto` looks at each file.
    """
    found: list[Row] = []
    kinds: dict[str, int] = {}
    for row in rows:
        if not is_text_file(row):
            found.append(row)
            continue
        text = row.values["document"].replace("\r\n", "\n")
        how = looked_at(text, row.path.suffix.lower()) if sample_by == "auto" else sample_by
        pieces = list(_PIECES[how](text))
        kinds[how] = kinds.get(how, 0) + len(pieces)
        found += [replace(row, values={"document": t}, line=at) for at, t in pieces]
    notices = [
        f"plain text is read as {count(number, 'document')}, {_WORDS[how]}"
        + ("" if sample_by != "auto" else " (found by looking; objective.sample_by chooses)")
        for how, number in kinds.items()
    ]
    return found, notices


def is_text_file(row: Row) -> bool:
    """Whether a row is the whole of a plain text file."""
    return row.path.suffix.lower() in (".txt", ".md") and row.values.keys() == {"document"}


def looked_at(text: str, suffix: str = ".txt") -> Literal["line", "paragraph", "document"]:
    """What the documents of a text file are, by its lines.

    Markdown is a document. A file whose lines are long and follow each other without a blank one
    has a document a line; where several such lines stand between blank ones, they are a document.
    Everything else (a book of wrapped lines, paragraphs of one line each) is one document.
    """
    blocks = [block for _, block in _paragraphs(text)]
    lines = [len(line) for block in blocks for line in block.split("\n") if line.strip()]
    if suffix == ".md" or len(lines) < 2 or median(lines) < _WRAPPED:
        return "document"
    if len(blocks) == 1:
        return "line"
    several = sum("\n" in block for block in blocks)
    return "paragraph" if 2 * several > len(blocks) else "document"


def _documents(text: str) -> Iterator[tuple[int, str]]:
    if text.strip():
        yield 1, text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            block.append(line)
        elif block:
            yield number - len(block), "\n".join(block)
            block = []


_PIECES = {"document": _documents, "line": _lines, "paragraph": _paragraphs}
"""The documents of a text, each with the line that it begins at."""
