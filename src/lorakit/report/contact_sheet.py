"""A contact sheet: the first pictures of rows beside what is asked and answered about them.

One HTML file that needs nothing else, with small copies of the pictures in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit.data.conversations import IMAGE
from lorakit.data.findings import AnySample
from lorakit.data.masking import TokenizedRow
from lorakit.data.picture_figures import PictureFigures
from lorakit.data.pictures import label
from lorakit.data.samples import Sample
from lorakit.data.thumbnails import pixel_size, thumbnail
from lorakit.errors import InputError
from lorakit.folder_name import folder_name
from lorakit.progress import track
from lorakit.report import numbers
from lorakit.report.page_templates import require_place, write_page

ROWS = 60
"""So many rows with pictures are shown, unless another number is asked for."""

_KIND = "contact-sheet"
_LONGEST = 600  # characters of a text that are shown
_MOST = 8  # pictures of a row


def write_contact_sheet(
    path: Path,
    model: str,
    source: Path,
    rows: Sequence[tuple[AnySample, TokenizedRow]],
    figures: PictureFigures,
    most: int = ROWS,
) -> int:
    """Writes the sheet of the first `most` rows that have pictures.

    Args:
        path: a new file, or an earlier contact sheet, which is replaced.
        source: the file that the rows are from.

    Returns: how many rows are shown.

    Raises:
        InputError: `path` is something else's place, or a picture cannot be read any more.
        LorakitError: it cannot be written.
    """
    require_sheet_place(path)
    chosen = [(s, r) for s, r in rows if isinstance(s, Sample) and _placed(r)][:most]
    shown = [_row(*pair) for pair in track(chosen, "drawing pictures")]
    (least_w, least_h), _, (most_w, most_h) = figures.sizes
    low, middle, high = figures.tokens
    spread = "all the same" if low == high else f"{low:,} to {high:,}"
    content = {
        "name": folder_name(source),
        "model": model,
        "verdict": f"{numbers.count(figures.pictures)} pictures in "
        f"{numbers.count(figures.rows)} rows to learn from.",
        "key_figures": [
            ("Pictures", numbers.count(figures.pictures), f"{figures.files:,} different ones"),
            ("Tokens a picture", numbers.count(middle), spread),
            ("Share of all tokens", f"{figures.share:.0%}", "read, never learned"),
            ("Largest", f"{most_w} × {most_h}", f"smallest {least_w} × {least_h}"),
        ],
        "shown": shown,
        "hidden": figures.rows - len(shown),
    }
    write_page(path, _KIND, content)
    return len(shown)


def require_sheet_place(path: Path) -> None:
    """Raises InputError unless a contact sheet may be written to `path`."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"the contact sheet is a page: name a file that ends in .html, not {path}")
    require_place(path, _KIND, "contact-sheet.html", "give another name")


def _placed(row: TokenizedRow) -> list[Any]:
    first = row.sequences[0]
    return [*first.pictures.placed] if first.pictures else []


def _row(sample: Sample, row: TokenizedRow) -> dict[str, Any]:
    placed = _placed(row)
    try:
        pictures = [_picture(one) for one in placed[:_MOST]]
    except InputError as error:
        raise InputError(f"{row.where}: a picture {error}") from error
    return {
        "where": row.where,
        "tokens": sum(one.end - one.begin for one in placed),
        "length": len(row.sequences[0]),
        "pictures": pictures,
        "hidden": len(placed) - len(pictures),
        "turns": [(role, _cut(text)) for role, text in _turns(sample)],
    }


def _picture(one: Any) -> dict[str, Any]:
    width, height = pixel_size(one.source)
    return {
        "name": label(one.source),
        "url": thumbnail(one.source),
        "size": f"{width} × {height}",
        "tokens": one.end - one.begin,
    }


def _turns(sample: Sample) -> Iterator[tuple[str, str]]:
    """Who says what; of a pair the rejected answer last."""
    first, *others = sample.parts
    for message in first.messages:
        yield message["role"], _text(message["content"])
    for other in others:
        yield "rejected", other.reference


def _text(content: Any) -> str:
    """A content's text, with a mark in the place of each picture that has text around it."""
    if isinstance(content, str):
        return content
    texts = [part["text"] if part["type"] == "text" else "▣" for part in content]
    pictures = [part for part in content if part["type"] == IMAGE]
    return " ".join(texts) if len(texts) > len(pictures) else ""


def _cut(text: str) -> str:
    rest = len(text) - _LONGEST
    return text if rest <= 0 else f"{text[:_LONGEST]} … ({rest:,} more characters)"
