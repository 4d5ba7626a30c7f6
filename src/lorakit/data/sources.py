"""What a recipe names to rows: a file, a folder of files, a saved data set, or one of the hub.

Everything is read whole into memory, or piece by piece (`open_pieces`). Every row remembers where
it stands. How one file is read is
left to `lorakit.data.files`, what the columns mean to `lorakit.data.formats`.
"""

import hashlib
import json
import mimetypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.data.arrow import (
    dataset_records,
    dataset_stream,
    hub_records,
    hub_splits,
    hub_stream,
    is_saved_dataset,
    saved_records,
    saved_split,
    saved_splits,
    saved_stream,
)
from lorakit.data.files import (
    is_text,
    json_line,
    kind_of,
    known_kinds,
    read_records,
    stream_records,
)
from lorakit.data.splits import LEARNED, SPLITS, by_split, notice_of_parts, split_of
from lorakit.errors import InputError, did_you_mean, listed, one_line

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<split>[^/]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file: its columns, and where it starts.

    `line` is 1-based. For Parquet and data sets, which have no lines, it is the number of the row.
    `name` is what the file is called in messages, its own name when it is empty.
    """

    values: dict[str, Any]
    path: Path
    line: int
    name: str = ""

    @property
    def where(self) -> str:
        """`orders.jsonl:12`, for messages."""
        return f"{one_line(self.name or self.path.name)}:{self.line}"

    def error(self, message: str) -> InputError:
        """An error about this row, which says where it stands."""
        return InputError(f"{self.where}: {message}")


@dataclass(frozen=True)
class Contents:
    """All rows of a source, the hash of what they were read from, and what was left out.

    `held_out` names the source's own part for validation, as a source, where it has one.
    """

    rows: list[Row]
    sha256: str
    notices: list[str]
    held_out: str | None = None


@dataclass(frozen=True)
class Piece:
    """A file or a data set whose records are read one by one, again and again.

    Attributes:
        records: begins to read: pairs of a number and a record, which `row` makes a row of.
    """

    path: Path
    name: str
    records: Callable[[], Iterator[tuple[int, Any]]]

    def row(self, number: int, record: Any) -> Row:
        """The row of a record. Raises InputError where it is broken."""
        if isinstance(record, bytes):
            record = json_line(record, self.path, number)
        return Row(record, self.path, number, self.name)


IN_MEMORY = "python:"
"""What the names of rows begin with that were given from Python and lie in no file."""

_given: ContextVar[Mapping[str, Iterable[dict[str, Any]]]] = ContextVar("rows given from Python")


@contextmanager
def rows_from_python(data: Any) -> Iterator[dict[str, str]]:
    """Lets sources be rows in memory, for the duration of a block.

    Args:
        data: rows to learn from, as an iterable of mappings or a `datasets.Dataset`; or a mapping
            with such under `train` and, to hold them out, under `eval`.

    Yields: the names of these sources, by the recipe's keys (`data.train`, `data.eval`).

    Raises:
        InputError: it is none of these.
    """
    parts = data if isinstance(data, Mapping) else {"train": data}
    if "train" not in parts or not parts.keys() <= {"train", "eval"}:
        raise InputError(
            f"data has {listed(map(str, parts)) or 'nothing'}: give the rows under 'train', and "
            "those to hold out, if there are any, under 'eval'"
        )
    records = {f"{IN_MEMORY}{key}": _records(rows, key) for key, rows in parts.items()}
    token = _given.set(records)
    try:
        yield {f"data.{key}": f"{IN_MEMORY}{key}" for key in parts}
    finally:
        _given.reset(token)


def _records(rows: Any, key: str) -> Iterable[dict[str, Any]]:
    if hasattr(rows, "with_format") and hasattr(rows, "num_rows"):
        return dataset_records(rows, f"data.{key}")
    if hasattr(rows, "state_dict") and isinstance(rows, Iterable):  # datasets.IterableDataset
        return rows
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
        raise InputError(
            f"data.{key} is a {type(rows).__name__}: give a list of rows, each a dict, or a "
            "datasets.Dataset; a file goes into the recipe's data"
        )
    found = list(rows)
    for i, row in enumerate(found, 1):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise InputError(
                f"data.{key}:{i}: is a {type(row).__name__}, expected a dict of columns"
            )
    return [dict(row) for row in found]


def _given_from_python(name: str) -> Contents:
    given = _given.get({})
    if name not in given:
        raise _not_given(name)
    label = f"data.{name.removeprefix(IN_MEMORY)}"
    rows = [Row(values, Path(name), i, label) for i, values in enumerate(given[name], 1)]
    return Contents(_some(rows, Path(label)), _sha256_of_rows(rows), [])


def _not_given(name: str) -> InputError:
    return InputError(
        f"{name}: these rows were given from Python and are in no file: give the same ones "
        "again, as in lorakit.train(recipe, data=rows)"
    )


def read_rows(path: str | Path, wanted: Sequence[str] = LEARNED) -> list[Row]:
    """All rows of the source at `path`, in order; arguments and errors as of `read_source`."""
    return read_source(path, wanted=wanted).rows


def read_source(
    path: str | Path, full_names: bool = False, wanted: Sequence[str] = LEARNED
) -> Contents:
    """All rows of a source, in order.

    Args:
        path: a data file, whose suffix says which format it has; a folder of data files of one
            kind, read in the order of their names; a folder saved by the library `datasets`; or
            an `owner/name` of the hub, where there is no such path. Behind all but a file,
            `:split` names the part that is meant.
        full_names: rows say the path as given instead of the file's name alone.
        wanted: the parts (train, validation, test) of which the first that there is is read,
            where the path names none.

    Raises:
        InputError: there is nothing to read there, or it is broken, not UTF-8, or without rows.
    """
    if str(path).startswith(IN_MEMORY):
        return _given_from_python(str(path))
    place = _expanded(path)
    try:
        base, split = _without_split(place)
        if base.is_dir():
            if is_saved_dataset(base):
                return _read_saved(base, split, full_names, wanted)
            return _read_folder(base, split, full_names, wanted)
        if (hub := _hub_id(str(path))) and not place.exists():
            return _read_hub(*hub, wanted)
        return _read_file(place, full_names)
    except OSError as error:
        raise _unreadable(place, error) from error


def open_pieces(
    path: str | Path, wanted: Sequence[str] = LEARNED
) -> tuple[list[Piece], Callable[[], str], list[str]]:
    """A source to be read piece by piece; arguments as of `read_source`.

    Returns: its files or its data set; what computes the hash of their bytes, of what lies in no
    file that of its name alone; and notices.

    Raises:
        InputError: there is nothing to read there.
    """
    name, notices = str(path), list[str]()
    if name.startswith(IN_MEMORY):
        rows = _given.get({}).get(name)
        if rows is None:
            raise _not_given(name)
        label = f"data.{name.removeprefix(IN_MEMORY)}"
        given = Piece(Path(name), label, lambda: enumerate(dataset_stream(rows), 1))
        return [given], partial(_sha256_of_text, name), notices
    place = _expanded(path)
    try:
        base, split = _without_split(place)
        if base.is_dir() and is_saved_dataset(base):
            if split is None and (names := saved_splits(base)):
                split, notices, _ = _choose_named(base, names, wanted)
            chosen = saved_split(base, split)
            files = sorted(file for file in chosen.rglob("*") if file.is_file())
            saved = Piece(chosen, chosen.name, lambda: enumerate(saved_stream(chosen), 1))
            return [saved], partial(_sha256_of_files, files, chosen), notices
        if (hub := _hub_id(name)) and not place.exists():
            owner, split = hub
            if split is None:
                split, notices, _ = _choose_named(Path(owner), hub_splits(owner), wanted)
            label, part = f"{owner}:{split}", split
            fetched = Piece(Path(owner), label, lambda: enumerate(hub_stream(owner, part), 1))
            return [fetched], partial(_sha256_of_text, label), notices
        if base.is_dir():
            files, notices, _ = _files_of(base, split, wanted)
            digest = partial(_sha256_of_files, files, base)
        else:
            files, digest = [_existing_file(place)], partial(file_sha256, place)
        return [Piece(f, "", partial(stream_records, f)) for f in files], digest, notices
    except OSError as error:
        raise _unreadable(place, error) from error


def _sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of the file's bytes, as 64 hexadecimal digits."""
    existing = _existing_file(_expanded(path))
    try:
        with existing.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(existing, error) from error


def _read_file(file: Path, full_names: bool) -> Contents:
    rows = _rows(_existing_file(file), str(file) if full_names else "")
    return Contents(_some(rows, file), file_sha256(file), [])


def _read_folder(
    folder: Path, split: str | None, full_names: bool, wanted: Sequence[str]
) -> Contents:
    """All rows of the files of one part and of one kind in `folder`."""
    used, notices, own = _files_of(folder, split, wanted)
    rows = [
        row for file in used for row in _rows(_existing_file(file), str(file) if full_names else "")
    ]
    return Contents(_some(rows, folder), _sha256_of_files(used, folder), notices, own)


def _files_of(
    folder: Path, split: str | None, wanted: Sequence[str]
) -> tuple[list[Path], list[str], str | None]:
    """The files of one part and of one kind in `folder`; plain text where there are no others.

    With what to say of the others, and the folder's own part for validation, where it has one.
    Subfolders are left out, but for those that are named for a part, where there are no files.
    """
    entries = sorted(folder.iterdir())
    shown = [entry for entry in entries if not entry.name.startswith((".", "_"))]
    files = _data_files(shown)
    if not files:
        inner = [entry for entry in shown if entry.is_dir() and split_of(entry.name)]
        files = _data_files(file for entry in inner for file in sorted(entry.iterdir()))
    if not files:
        raise InputError(
            f"{folder}: is a folder without data files; name a file, or a folder of "
            f"{known_kinds()} files"
        )
    of_name = {file.relative_to(folder).as_posix(): file for file in files}
    texts = is_text(files[0].name)
    # A document's name may have a word such as "test" in it; a part's is nothing else.
    named = not texts or any(split_of(file.stem) and file.stem.isalpha() for file in files)
    parts: dict[str | None, list[str]] = {None: list(of_name)}
    if named:
        parts = by_split(of_name)
    chosen = _chosen(folder, parts, split, wanted)
    used = [of_name[name] for name in parts[chosen]]
    kinds = sorted({str(kind_of(file.name)) for file in used})
    if len(kinds) > 1 and not texts:
        raise InputError(
            f"{folder}: holds {' and '.join(kinds)} files; name those that are meant, as in "
            f"data.train=[{used[0]}, ...]"
        )
    notices = [] if split else notice_of_parts(folder, parts, chosen)
    read = {*files, *(file.parent for file in files)}
    if others := [entry.name for entry in entries if entry not in read]:
        notices.append(
            f"{folder}: of its entries {len(entries) - len(others)} are read ({', '.join(kinds)}), "
            f"{len(others)} are left out: {one_line(listed(others, 5))}"
        )
    return used, notices, _own_held_out(folder, parts, chosen)


def _data_files(entries: Iterable[Path]) -> list[Path]:
    """Those that can be read; plain text only where it is all, as others have a README beside."""
    known = [entry for entry in entries if not entry.is_dir() and kind_of(entry.name)]
    return [entry for entry in known if not is_text(entry.name)] or known


def _chosen(
    place: Path, parts: dict[str | None, list[str]], split: str | None, wanted: Sequence[str]
) -> str | None:
    """The part that is read. Raises InputError where there is none such."""
    if split:
        if split in parts:
            return split
        known = listed(name for name in parts if name) or "none"
        raise InputError(f"{place}: has no files named for '{split}'; it has {known}")
    if found := [part for part in (*wanted, None) if part in parts]:
        return found[0]
    if wanted != LEARNED:  # what is measured on what was learned is found out elsewhere
        return next(iter(parts))
    names = listed((name for several in parts.values() for name in several), 3)
    raise InputError(
        f"{place}: its files are for {listed(map(str, parts))} by their names ({names}), none for "
        "training; name the file to learn from"
    )


def _own_held_out(
    place: object, parts: dict[str | None, list[str]], chosen: str | None
) -> str | None:
    return f"{place}:validation" if "validation" in parts and chosen != "validation" else None


def _read_saved(
    folder: Path, split: str | None, full_names: bool, wanted: Sequence[str]
) -> Contents:
    names = saved_splits(folder) if split is None else []
    split, notices, own = _choose_named(folder, names, wanted) if names else (split, [], None)
    chosen = saved_split(folder, split)
    name = str(folder) if full_names else folder.name
    name += f":{chosen.name}" if chosen != folder else ""
    rows = [Row(values, chosen, i, name) for i, values in enumerate(saved_records(chosen), 1)]
    files = sorted(file for file in chosen.rglob("*") if file.is_file())
    return Contents(_some(rows, chosen), _sha256_of_files(files, chosen), notices, own)


def _choose_named(
    place: Path, names: Sequence[str], wanted: Sequence[str]
) -> tuple[str, list[str], str | None]:
    """Of a data set's splits the one to read, what to say, and its own split for validation.

    For learning that is `train`, whatever else there is.
    """
    parts = by_split(names)
    split = "train"
    if wanted != LEARNED:
        split = next((parts[part][0] for part in (*wanted, None) if part in parts), split)
    others = [name for name in names if name != split]
    notices = []
    if others:
        notices.append(f"{place}: its split {split} is read, left out are {listed(others, 5)}")
    own = next(iter(parts.get("validation", ())), None)
    return split, notices, f"{place}:{own}" if own and own != split else None


def _read_hub(name: str, split: str | None, wanted: Sequence[str]) -> Contents:
    place = Path(name)
    split, notices, own = (
        (split, [], None) if split else _choose_named(place, hub_splits(name), wanted)
    )
    label = f"{name}:{split}"
    rows = [Row(values, place, i, label) for i, values in enumerate(hub_records(name, split), 1)]
    return Contents(_some(rows, place), _sha256_of_rows(rows), notices, own)


def _sha256_of_rows(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows as JSON, one a line."""
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(row.values, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(line.encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def _rows(file: Path, name: str) -> list[Row]:
    return [Row(values, file, line, name) for line, values in read_records(file)]


def _some(rows: list[Row], place: Path) -> list[Row]:
    if not rows:
        raise InputError(f"{place}: holds no rows; give a file with at least one")
    return rows


def _sha256_of_files(files: Iterable[Path], folder: Path) -> str:
    """SHA-256 over the names (from `folder` on) and hashes of all files."""
    lines = (f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _expanded(path: str | Path) -> Path:
    """The path; no shell expands the `~` in a recipe."""
    place = Path(path)
    if place.parts[:1] != ("~",):
        return place
    try:
        return place.expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{place}: there is no home folder to expand ~ to; write the full path"
        ) from error


def _without_split(place: Path) -> tuple[Path, str | None]:
    """A folder and the `:split` behind it; the place itself for others."""
    base, colon, split = str(place).rpartition(":")
    if not colon or place.exists():
        return place, None
    folder = Path(base)
    if is_saved_dataset(folder) or (split in SPLITS and folder.is_dir()):
        return folder, split
    return place, None


def _hub_id(text: str) -> tuple[str, str | None] | None:
    """Name and split, if `text` can only be meant for the hub.

    What has a known suffix, or stands in a folder that exists, is a path with a typing error:
    nothing is asked of the network for it.
    """
    match = _HUB_ID.fullmatch(text)
    if not match or kind_of(match["name"]) or any(mimetypes.guess_type(match["name"])):
        return None
    if Path(text).parent.exists():
        return None
    return match["name"], match["split"]


def _existing_file(file: Path) -> Path:
    try:
        if file.is_file():
            return file
        if file.is_dir():
            raise InputError(f"{file}: is a folder; name a file in it")
        if file.exists():
            raise InputError(f"{file}: is a pipe or device; save its contents to a file first")
        if file.is_symlink():
            raise InputError(f"{file}: is a broken symbolic link (to {file.readlink()}); repair it")
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
    except OSError as error:
        raise _unreadable(file, error) from error
    cure = did_you_mean(file.name, siblings) or "; check the path"
    raise InputError(f"{file}: no such file{cure}")


def _unreadable(file: Path, error: OSError) -> InputError:
    return InputError(f"{file}: cannot be read ({error.strerror or error}); check the path")
