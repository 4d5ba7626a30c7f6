"""Pages as one file that needs nothing else, by the templates beside this module.

Everything that is shown is text of unknown origin: templates escape it, and a page's policy lets
nothing run or load.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lorakit import atomic
from lorakit.report import numbers
from lorakit.version import __version__


def write_page(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Writes a `report` or a `sweep`; `content` is what its template names."""
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
