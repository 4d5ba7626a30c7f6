"""Files to rows: JSON, JSON Lines, CSV, TSV and Parquet, read whole into memory.

Every row remembers the file and the line it starts at, so that whoever finds something wrong
with it later can say where. What the columns mean is decided in `lorakit.data.formats`.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import InputError, did_you_mean


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file: its columns, and where it starts.

    `line` is 1-based. For Parquet, which has no lines, it is the number of the row.
    """

    values: dict[str, Any]
    path: Path
    line: int

    @property
    def where(self) -> str:
        """`orders.jsonl:12`, for messages."""
        return f"{self.path.name}:{self.line}"


def read_rows(path: str | Path) -> list[Row]:
    """All rows of the file at `path`, in file order; the suffix says which format it has.

    Raises:
        InputError: the file is missing, of another type, broken, not UTF-8, or without rows.
    """
    file = _existing_file(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise InputError(
            f"{file}: the suffix '{file.suffix}' says no known format; "
            f"convert or rename it to one of {', '.join(_READERS)}"
        )
    try:
        rows = [Row(values, file, line) for line, values in reader(file)]
    except OSError as error:
        raise _unreadable(file, error) from error
    if not rows:
        raise InputError(f"{file}: holds no rows; give a file with at least one")
    return rows


def file_sha256(path: str | Path) -> str:
    """SHA-256 of the file's bytes, as 64 hexadecimal digits."""
    existing = _existing_file(path)
    try:
        with existing.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(existing, error) from error


def _existing_file(path: str | Path) -> Path:
    file = Path(path)
    try:
        if file.parts[:1] == ("~",):  # no shell expands the paths in a recipe
            file = file.expanduser()
        if file.is_dir():
            raise InputError(f"{file}: is a folder; name a file in it")
        if not file.is_file():
            siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
            raise InputError(f"{file}: no such file{did_you_mean(file.name, siblings)}")
    except OSError as error:
        raise _unreadable(file, error) from error
    return file


def _unreadable(file: Path, error: OSError) -> InputError:
    return InputError(f"{file}: cannot be read ({error.strerror or error}); check the path")


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}:{line}: not UTF-8 text; save the file as UTF-8") from error
    if (nul := text.find("\0")) >= 0:
        line = text.count("\n", 0, nul) + 1
        raise InputError(f"{file}:{line}: holds a NUL byte; save the file as UTF-8 text")
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys occur once; `json` would silently keep the last of two."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' occurs twice in one object")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON (write null or a number)")


_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _decode(
    text: str, at: int, file: Path, line: int, hint: str = ""
) -> tuple[dict[str, Any], int]:
    """The object that starts at `text[at]` on `line`, and the index just behind it."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        broken = line + text.count("\n", at, error.pos)
        column = error.pos - text.rfind("\n", 0, error.pos)
        raise InputError(f"{file}:{broken}:{column}: broken JSON ({error.msg}){hint}") from error
    except ValueError as error:  # our two refusals, and integers past Python's digit limit
        reason = str(error).split(";")[0]
        raise InputError(f"{file}:{line}: {reason}; correct this row") from error
    except RecursionError as error:
        raise InputError(f"{file}:{line}: nested too deeply; a row is a flat object") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}:{line}: a row must be an object like {{...}}{hint}")
    return value, end


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _read_json(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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
        raise InputError(f"{file}:{line}: broken JSON (expected ',' or ']' behind a row)")
    if _skip_space(text, at + 1) != len(text):
        raise InputError(f"{file}:{line}: broken JSON (there is text behind the array's ']')")


def _read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    hint = "; a .jsonl file has one object a line (rename it to .json if it is one array)"
    # Not str.splitlines: U+2028 and its like are allowed inside a JSON string.
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        start = _skip_space(line, 0)
        if start == len(line):
            continue
        values, end = _decode(line, start, file, number, hint)
        end = _skip_space(line, end)
        if end != len(line):
            raise InputError(f"{file}:{number}:{end + 1}: text behind the object{hint}")
        yield number, values


def _read_csv(file: Path, delimiter: str = ",") -> Iterator[tuple[int, dict[str, Any]]]:
    text = io.StringIO(_read_text(file), newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
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
            header = record
            if twice := [name for name in header if header.count(name) > 1]:
                raise InputError(f"{file}:{line}: two columns are named '{twice[0]}'; rename one")
            if len(header) == 1 and ";" in header[0]:  # how some locales write .csv
                raise InputError(f"{file}:{line}: columns are separated by ';'; save with commas")
            continue
        if len(record) != len(header):
            raise InputError(
                f"{file}:{line}: {len(record)} columns where the header has {len(header)}; "
                f"quote values that hold {'a comma' if delimiter == ',' else 'a tab'} or a newline"
            )
        yield line, dict(zip(header, record, strict=True))


def _read_tsv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return _read_csv(file, delimiter="\t")


def _read_parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # ParquetFile, not read_table: that one adds columns from folder names like `year=2024`.
        with pq.ParquetFile(file) as parquet:
            records = parquet.read().to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{file}: not a readable Parquet file ({reason}); write it anew"
        ) from error
    yield from enumerate(records, 1)


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
