"""What lorakit prints and reads at the terminal: no character acts on it, and none is an error.

Files, models and requests bring names and texts. Escape sequences in them could rewrite the
screen, and overrides of the writing direction make a line read as another one. Every line is
printed by `say`, `write` or `open_console`, which show such characters as escapes (`\\u001b`).
The escapes are JSON's, so that printed JSON keeps its meaning. Streams keep the encoding of the
console or pipe (gbk, cp1252, ascii); a character that it lacks is printed as a plain sign or an
escape. Files are written elsewhere, always as UTF-8.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult

# Control characters (C0 but tab and line feed, DEL, C1), separators of lines, marks and overrides
# of the writing direction, halves of surrogate pairs.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_ERRORS = "lorakit.console"
# Signs that lorakit's own tables and lines are made of, for encodings that lack them.
_PLAIN = {
    "…": "...",
    "→": "->",
    "×": "x",
    "·": "*",
    "±": "+-",
    "‖": "||",
    "Δ": "delta ",
    "█": "#",
    "✓": "ok:",
    "↵": "\\n",
    "⟦": "[[",
    "⟧": "]]",
    "✂": "%",
    "–": "-",
    "—": "-",
    "’": "'",
    "“": '"',
    "”": '"',
    "\u00a0": " ",
}


def settle_streams() -> None:
    """Makes the standard streams take every character; they keep their encodings.

    A stream that was replaced by one of another kind (a test's, a notebook's) is left as it is.
    """
    codecs.register_error(_ERRORS, _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes are kept for `readable`


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler of `settle_streams`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign) or json.dumps(sign)[1:-1] for sign in wanted), error.end


def visible(text: str) -> str:
    """`text` with an escape such as `\\u001b` for every character that acts on a terminal."""
    return _ACTING.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def say(line: object = "", *, err: bool = False) -> None:
    """Prints one line, to standard error if `err`; line feeds in it are escaped too."""
    write(str(line).replace("\n", "\\n") + "\n", err=err)


def say_all(lines: Iterable[object], *, err: bool = True) -> None:
    """Prints each line as `say` does; notices go to standard error."""
    for line in lines:
        say(line, err=err)


def say_json(value: object, *, indent: int | None = 2) -> None:
    """Prints a value of JSON's types; with `indent` None on one line.

    A stream that is not UTF-8 gets escapes (`\\u4e2d`), which mean the same to every reader.
    """
    write(json.dumps(value, indent=indent, ensure_ascii=not _is_utf8(sys.stdout)) + "\n")


def _is_utf8(stream: IO[str]) -> bool:
    encoding = getattr(stream, "encoding", None)
    return encoding is None or codecs.lookup(encoding).name == "utf-8"


def write(text: str, *, err: bool = False) -> None:
    """Prints `text`, which may be many lines or a part of one, and flushes it."""
    stream = sys.stderr if err else sys.stdout
    shown = visible(text)
    try:
        stream.write(shown)
    except UnicodeEncodeError:  # the stream is not one of `settle_streams`
        codecs.register_error(_ERRORS, _replaced)
        encoding = stream.encoding or "ascii"
        stream.write(shown.encode(encoding, _ERRORS).decode(encoding))
    stream.flush()


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


def piped_lines() -> Iterator[str]:
    """Lines of standard input as they come: UTF-8, else in the console's encoding."""
    raw_stream = getattr(sys.stdin, "buffer", None)
    if raw_stream is None:
        yield from sys.stdin
        return
    for raw in raw_stream:
        yield decoded(raw)


def piped_text() -> str:
    """All of standard input: UTF-8, UTF-16 with a byte order mark, or the console's encoding."""
    raw_stream = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if raw_stream is None else decoded(raw_stream.read())


def readable(line: str) -> str:
    """A typed line, whose surrogates (bytes that the console's encoding lacks) are decoded."""
    if line.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in line):
        return line
    try:
        return decoded(line.encode(_input_encoding(), "surrogateescape"))
    except UnicodeEncodeError:
        return line.encode("utf-8", "replace").decode()


def decoded(raw: bytes) -> str:
    """Bytes from outside as text: no byte is an error, the last resort is U+FFFD."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16", "replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        encoding = _input_encoding()
        return raw.decode("utf-8" if encoding == "ascii" else encoding, "replace")


def _input_encoding() -> str:
    return codecs.lookup(getattr(sys.stdin, "encoding", None) or "utf-8").name
