"""One data file to records: JSON, JSON Lines, CSV and TSV (gzipped too), Parquet, plain text.

Every record comes with the line it starts at, so that whoever finds something wrong with it later
can say where. Which files are read is decided in `lorakit.data.sources`.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorakit.data import strict_json
from lorakit.data.arrow import UNPACKED_LIMIT, parquet_records, parquet_stream, too_large
from lorakit.errors import InputError

Records = Iterator[tuple[int, dict[str, Any]]]
"""The 1-based line that a record starts at (in Parquet: the number of the row), and its values."""


def kind_of(name: str) -> str | None:
    """The suffix that says how a file of this name is read; None for other files."""
    name = name.lower()
    if name.endswith(".gz"):
        name = name.removesuffix(".gz")
        return next((kind for kind in _GZIPPED if name.endswith(kind)), None)
    return next((kind for kind in _READERS if name.endswith(kind)), None)


def is_text(name: str) -> bool:
    """Whether a file of this name is plain text, all of it one record."""
    return kind_of(name) in _TEXT


def known_kinds() -> str:
    """All suffixes, for messages."""
    return f"{', '.join(_READERS)} (or {', '.join(f'{kind}.gz' for kind in _GZIPPED)})"


def read_records(file: Path) -> Records:
    """The records of `file`, in file order.

    Raises:
        InputError: the file is of another type, broken, not UTF-8, or unpacks to too much.
        OSError: it cannot be read.
    """
    kind = kind_of(file.name)
    if kind is None:
        raise InputError(
            f"{file}: not a known file type (suffix '{file.suffix}'); "
            f"convert or rename it to one of {known_kinds()}"
        )
    return _READERS[kind](file)


def _read_bytes(file: Path) -> bytes:
    if file.suffix.lower() != ".gz":
        return file.read_bytes()
    size = file.stat().st_size
    unpacked = io.BytesIO()
    try:
        with gzip.open(file) as packed:
            while chunk := packed.read(1 << 20):
                unpacked.write(chunk)
                if limit := too_large(unpacked.tell(), size):
                    raise InputError(f"{file}: unpacks to {limit}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{file}: a damaged or incomplete gzip file ({error}); write it again"
        ) from error
    return unpacked.getvalue()


def _read_text(file: Path) -> str:
    data = _read_bytes(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}:{line}: not UTF-8 text; save the file as UTF-8") from error
    if (nul := text.find("\0")) >= 0:
        line = text.count("\n", 0, nul) + 1
        raise InputError(f"{file}:{line}: holds a NUL byte; save the file as UTF-8 text")
    return text


_SPACE = re.compile(r"[ \t\r\n]*")


def _decode(
    text: str, at: int, file: Path, line: int, hint: str = ""
) -> tuple[dict[str, Any], int]:
    """The object that starts at `text[at]` on `line`, and the index just behind it."""
    try:
        value, end = strict_json.decode(text, at)
    except json.JSONDecodeError as error:
        broken = line + text.count("\n", at, error.pos)
        column = error.pos - text.rfind("\n", 0, error.pos)
        reason, cure = f"broken JSON ({error.msg})", hint or "; repair it there"
        if text.startswith("\ufeff", error.pos):
            reason, cure = "a byte order mark inside the file", "; remove it"
        raise InputError(f"{file}:{broken}:{column}: {reason}{cure}") from error
    except ValueError as error:  # what is refused, and integers past Python's digit limit
        reason = str(error).split(";")[0]
        raise InputError(f"{file}:{line}: {reason}; correct this row") from error
    if not isinstance(value, dict):
        cure = hint or "; repair it"
        raise InputError(f"{file}:{line}: a row must be an object like {{...}}{cure}")
    return value, end


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _read_json(file: Path) -> Records:
    """Element by element instead of `json.loads`, so that each row knows its line."""
    text = _read_text(file)
    at = _skip_space(text, 0)
    if at == len(text):
        return
    line, counted = 1 + text.count("\n", 0, at), at
    if text[at] != "[":
        raise InputError(
            f"{file}:{line}: a .json file must be one array of objects like [{{...}}, ...]; "
            "wrap the rows in one, or rename the file to .jsonl if each line is an object"
        )
    at = _skip_space(text, at + 1)
    more = not text.startswith("]", at)
    while more:
        line, counted = line + text.count("\n", counted, at), at
        values, at = _decode(text, at, file, line)
        yield line, values
        at = _skip_space(text, at)
        more = text.startswith(",", at)
        if more:
            at = _skip_space(text, at + 1)
    line += text.count("\n", counted, at)
    if not text.startswith("]", at):
        raise InputError(
            f"{file}:{line}: broken JSON (expected ',' or ']' after a row); repair it there"
        )
    if _skip_space(text, at + 1) != len(text):
        raise InputError(
            f"{file}:{line}: broken JSON (there is text after the array's ']'); remove it"
        )


def _read_json_lines(file: Path) -> Records:
    # Not str.splitlines: U+2028 and its like are allowed inside a JSON string.
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if _skip_space(line, 0) < len(line):
            yield number, json_line(line, file, number)


def json_line(line: str | bytes, file: Path, number: int) -> dict[str, Any]:
    """The object in a line of JSON Lines that is not blank.

    Raises:
        InputError: it is not UTF-8, or not one object.
    """
    hint = "; a .jsonl file has one object a line (rename it to .json if it is one array)"
    if isinstance(line, bytes):
        try:
            line = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}:{number}: not UTF-8 text; save the file as UTF-8") from error
    values, end = _decode(line, _skip_space(line, 0), file, number, hint)
    end = _skip_space(line, end)
    if end != len(line):
        raise InputError(f"{file}:{number}:{end + 1}: text after the object{hint}")
    return values


def stream_records(file: Path) -> Iterator[tuple[int, Any]]:
    """The records of `file` as `read_records` has them, a few in memory at a time.

    Those of JSON Lines are still bytes, which `json_line` reads.

    Raises:
        InputError: files of this type are only read whole, or it is broken.
        OSError: it cannot be read.
    """
    kind = kind_of(file.name)
    if kind == ".parquet":
        yield from enumerate(parquet_stream(file), 1)
        return
    if kind not in (".jsonl", ".ndjson"):
        raise InputError(
            f"{file}: data.streaming reads .jsonl, .ndjson and .parquet files and data sets: "
            "convert it, or leave data.streaming out"
        )
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as lines:
        number = 0
        try:
            while line := lines.readline(UNPACKED_LIMIT + 1):
                number += 1
                if len(line) > UNPACKED_LIMIT:
                    raise InputError(
                        f"{file}:{number}: a line of more than {UNPACKED_LIMIT >> 20} MiB; a "
                        ".jsonl file has one object a line"
                    )
                if line.strip():
                    yield number, line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(
                f"{file}: a damaged or incomplete gzip file ({error}); write it again"
            ) from error


_BLANK = (
    " \t\r\n\xa0\u3000\u200b\ufeff"  # around a column's name: blanks, and a second byte order mark
)


def _is_spaced(text: str) -> bool:
    """Whether the header has a blank behind each of its commas, so that they belong to them."""
    header = text.lstrip("\r\n").partition("\n")[0]
    return "," in header and header.count(",") == header.count(", ")


def _read_csv(file: Path, delimiter: str = ",") -> Records:
    whole = _read_text(file)
    reader = csv.reader(
        io.StringIO(whole, newline=""),
        delimiter=delimiter,
        strict=True,
        skipinitialspace=delimiter == "," and _is_spaced(whole),
    )
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            cure = (
                "long texts fit in .jsonl" if "field larger" in str(error) else "check its quotes"
            )
            raise InputError(f"{file}:{line}: broken record ({error}); {cure}") from error
        if record is None:
            return
        if not record:  # a blank line
            continue
        if not header:
            header = [name.strip(_BLANK) for name in record]
            if twice := next((n for n, times in Counter(header).items() if times > 1), None):
                raise InputError(f"{file}:{line}: two columns are named '{twice}'; rename one")
            if len(header) == 1 and ";" in header[0]:  # how some locales write .csv
                raise InputError(f"{file}:{line}: columns are separated by ';'; save with commas")
            continue
        if len(record) != len(header):
            raise InputError(
                f"{file}:{line}: {len(record)} columns where the header has {len(header)}; "
                f"quote values that hold {'a comma' if delimiter == ',' else 'a tab'} or a newline"
            )
        yield line, dict(zip(header, record, strict=True))


def _read_tsv(file: Path) -> Records:
    return _read_csv(file, delimiter="\t")


def _read_parquet(file: Path) -> Records:
    yield from enumerate(parquet_records(file), 1)


def _read_plain_text(file: Path) -> Records:
    text = _read_text(file)
    first = text.lstrip().partition("\n")[0]
    if first.startswith(("{", "[{")):
        try:
            strict_json.decode(first)
        except ValueError:
            pass
        else:
            raise InputError(
                f"{file}: its first line is JSON, and a '{file.suffix}' file is read as plain "
                f"text; rename it to one of {known_kinds()}"
            )
    if text.strip():
        yield 1, {"document": text}


_READERS: dict[str, Callable[[Path], Records]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_plain_text,
    ".md": _read_plain_text,
}
_TEXT = (".txt", ".md")
_GZIPPED = [kind for kind in _READERS if kind not in (".parquet", *_TEXT)]
