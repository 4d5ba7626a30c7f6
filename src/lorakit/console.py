"""What lorakit prints, without characters that act on a terminal.

Files, models and requests bring names and texts. Escape sequences in them could rewrite the
screen, and overrides of the writing direction make a line read as another one. Every line is
printed by `say`, `write` or `open_console`, which show such characters as escapes (`\\u001b`).
The escapes are JSON's, so that printed JSON keeps its meaning.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult

# Control characters (C0 but tab and line feed, DEL, C1), separators of lines, marks and overrides
# of the writing direction, halves of surrogate pairs.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """`text` with an escape such as `\\u001b` for every character that acts on a terminal."""
    return _ACTING.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def say(line: object = "", *, err: bool = False) -> None:
    """Prints one line, to standard error if `err`; line feeds in it are escaped too."""
    write(str(line).replace("\n", "\\n") + "\n", err=err)


def say_json(value: object) -> None:
    """Prints a value of JSON's types, indented."""
    write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write(text: str, *, err: bool = False) -> None:
    """Prints `text`, which may be many lines or a part of one, and flushes it."""
    import typer

    typer.echo(visible(text), nl=False, err=err)


def open_console(*, stderr: bool = False, quiet: bool = False, soft_wrap: bool = False) -> Console:
    """A console for tables, colours and progress; a text is never read as rich's markup."""
    from rich.console import Console, RenderHook
    from rich.segment import Segment

    class Plain:
        """A renderable whose text is made visible; rich's own sequences are kept."""

        def __init__(self, inner: ConsoleRenderable) -> None:
            self._inner = inner

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for part in console.render(self._inner, options):
                yield part if part.control else Segment(visible(part.text), part.style)

    class Hook(RenderHook):
        def process_renderables(
            self, renderables: list[ConsoleRenderable]
        ) -> list[ConsoleRenderable]:
            return [Plain(one) for one in renderables]

    console = Console(
        stderr=stderr,
        quiet=quiet,
        soft_wrap=soft_wrap,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.push_render_hook(Hook())
    return console
