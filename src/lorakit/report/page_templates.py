"""Pages as one file that needs nothing else, by the templates beside this module.

Everything that is shown is text of unknown origin: templates escape it, and a page's policy lets
nothing run or load.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lorakit import atomic
from lorakit.errors import InputError
from lorakit.report import numbers
from lorakit.version import __version__


def require_place(path: Path, kind: str, name: str, cure: str) -> None:
    """Refuses a place that a page of this kind may not be written to.

    Args:
        kind: as of `write_page`; an earlier one there is replaced.
        name: what such a file may be called.
        cure: what to do where the place is taken.

    Raises:
        InputError: it is a folder, holds something else, or lies where nothing can be written.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file, such as {path / name}")
    if path.exists() and not _is_page(path, kind):
        raise InputError(f"{path} exists and is not a {kind.replace('-', ' ')}: {cure}")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "cannot be written to" if parent.is_dir() else "is a file, not a folder"
        raise InputError(f"{path}: {parent} {why}: {cure.replace('name', 'place')}")


def _is_page(path: Path, kind: str) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return f'<meta name="generator" content="lorakit {kind}">'.encode() in file.read(2000)
    return False


def write_page(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Writes a `report`, a `sweep` or a `contact-sheet`, by the template of that name."""
    content = {"kind": kind, "version": __version__, "numbers": numbers, **content}
    page = _templates().get_template(f"{kind}.html.jinja").render(content)
    # Half of a surrogate pair, which JSON can hold, is no character.
    atomic.write_file(path, page.encode(errors="replace"))


@cache
def _templates() -> Environment:
    """Templates that escape what they are given, and take nothing that is not given."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
