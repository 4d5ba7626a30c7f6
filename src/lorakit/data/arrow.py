"""Arrow tables to records: Parquet files, folders saved by `datasets`, and data sets of the hub.

Arrow gives all structs of a column the same keys and fills those that one lacks with null, so
nulls below the columns are taken away again. NaN, which pandas has for a missing value, is null.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, listed

if TYPE_CHECKING:
    import pyarrow

ROW_LIMIT = 10_000_000
"""Rows of one source: all are in memory, and a few kilobytes of Parquet can claim billions."""

AT_ONCE = 512
"""Rows that are unpacked at a time."""

UNPACKED_LIMIT = 128 * 2**20
"""Bytes that packed data may always unpack to; beyond them, `RATIO_LIMIT` times the file's size."""

RATIO_LIMIT = 100
"""More than text reaches: deflate makes 3 to 10 of prose, and up to 1,000 of a bomb."""


def too_large(unpacked: int, packed: int) -> str | None:
    """What is wrong, and its cure, where `packed` bytes have become `unpacked`; None if nothing."""
    if unpacked <= max(UNPACKED_LIMIT, RATIO_LIMIT * packed):
        return None
    return (
        f"more than {UNPACKED_LIMIT >> 20} MiB and {RATIO_LIMIT} times its own size, which data "
        "does not; if it is meant, give it as .jsonl"
    )


def parquet_records(file: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        InputError: the file is damaged, has a column twice, or holds more than the limits.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # ParquetFile, not read_table: that one adds columns from folder names like `year=2024`.
        with pq.ParquetFile(file) as parquet:
            _check_rows(str(file), parquet.metadata.num_rows)
            _check_names(str(file), parquet.schema_arrow.names)
            size, unpacked, batches = file.stat().st_size, 0, []
            for batch in parquet.iter_batches(batch_size=AT_ONCE):
                unpacked += sum(_decoded(column).nbytes for column in batch.columns)
                if limit := too_large(unpacked, size):
                    raise InputError(f"{file}: unpacks to {limit}")
                batches.append(batch)
            table = pa.Table.from_batches(batches, parquet.schema_arrow)
        return _records(table)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise _not_readable(file, error) from error


def parquet_stream(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, `AT_ONCE` in memory at a time.

    Raises:
        InputError: the file is damaged, or has a column twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            _check_names(str(file), parquet.schema_arrow.names)
            for batch in parquet.iter_batches(batch_size=AT_ONCE):
                yield from _records(pa.Table.from_batches([batch]))
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise _not_readable(file, error) from error


def _not_readable(file: Path, error: Exception) -> InputError:
    reason = str(error).split("\n")[0]
    return InputError(f"{file}: not a readable Parquet file ({reason}); write it again")


def _decoded(column: "pyarrow.Array") -> "pyarrow.Array":
    """The column as its rows have it: one text that all rows share counts once a row."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved_splits(folder: Path) -> list[str]:
    """The names of a saved `DatasetDict`'s splits; none for a saved `Dataset`."""
    if not (folder / "dataset_dict.json").is_file():
        return []
    return sorted(part.name for part in folder.iterdir() if (part / "state.json").is_file())


def saved_split(folder: Path, split: str | None) -> Path:
    """The folder of one split of a saved `DatasetDict`, or of a saved `Dataset` itself.

    Raises:
        InputError: there is no such split.
    """
    if not (folder / "dataset_dict.json").is_file():
        if split is not None:
            raise InputError(f"{folder}: is a data set without splits; leave out ':{split}'")
        return folder
    wanted = folder / (split or "train")
    if not (wanted / "state.json").is_file():
        splits = saved_splits(folder)
        raise InputError(
            f"{folder}: has no split '{wanted.name}'; it has {listed(splits) or 'none'}: "
            f"name one, as in {folder}:{(splits or ['train'])[0]}"
        )
    return wanted


def saved_records(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder written by `Dataset.save_to_disk`.

    Raises:
        InputError: `datasets` is not installed, or the folder is damaged.
    """
    needed = f"{folder}: is a folder saved by the library datasets"
    failed = f"{folder}: cannot be read as a saved data set"
    with _library(needed, failed, "save it again") as datasets:
        return dataset_records(datasets.load_from_disk(str(folder)), str(folder))


def hub_records(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of a split of the hub's data set `owner/name`, from the local cache or fetched.

    Raises:
        InputError: `datasets` is not installed, or there is no such data set within reach.
    """
    with _hub(name, f" its split '{split}'") as datasets:
        return dataset_records(datasets.load_dataset(name, split=split), name)


def dataset_stream(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset` or `IterableDataset` one by one."""
    for row in dataset:
        yield {k: None if _is_null(value) else _without_nulls(value) for k, value in row.items()}


def saved_stream(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a folder written by `Dataset.save_to_disk`; raises as `saved_records`."""
    needed = f"{folder}: is a folder saved by the library datasets"
    failed = f"{folder}: cannot be read as a saved data set"
    with _library(needed, failed, "save it again") as datasets:
        yield from dataset_stream(datasets.load_from_disk(str(folder)))


def hub_stream(name: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split of the hub's data set `owner/name`, fetched as they are read.

    Raises:
        InputError: as `hub_records`.
    """
    with _hub(name, f" its split '{split}'") as datasets:
        yield from dataset_stream(datasets.load_dataset(name, split=split, streaming=True))


def hub_splits(name: str) -> list[str]:
    """The names of the splits of the hub's data set `owner/name`. Raises as `hub_records`."""
    with _hub(name, " it") as datasets:
        return [str(split) for split in datasets.load_dataset(name)]


def dataset_records(dataset: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a `datasets.Dataset`. Raises InputError for more than `ROW_LIMIT`."""
    table = dataset.with_format("arrow")[:]
    _check_rows(name, table.num_rows)
    return _records(table)


def _hub(name: str, part: str) -> AbstractContextManager[Any]:
    return _library(
        f"{name}: is not a file here, and would be a data set of the hub",
        f"{name}: is not a file here, and as a data set of the hub{part} cannot be loaded",
        "check the name and the network, or give a file",
    )


@contextmanager
def _library(needed: str, failed: str, cure: str) -> Iterator[Any]:
    """The library `datasets`, whose errors of any kind become one line."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{needed}, which needs that library: pip install 'lorakit[data]'"
        ) from error
    try:
        datasets.disable_progress_bars()
        yield datasets
    except InputError:
        raise
    except Exception as error:  # no network, no such name, a damaged file, …
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{failed} ({reason}); {cure}") from error


def _check_rows(name: str, rows: int) -> None:
    if rows > ROW_LIMIT:
        raise InputError(
            f"{name}: has {rows:,} rows, and at most {ROW_LIMIT:,} are read; give a part of it"
        )


def _check_names(name: str, columns: Sequence[str]) -> None:
    if twice := next((column for column, times in Counter(columns).items() if times > 1), None):
        raise InputError(f"{name}: two columns are named '{twice}'; rename one")


def _records(table: "pyarrow.Table") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="strict")
    return [
        {name: None if _is_null(value) else _without_nulls(value) for name, value in row.items()}
        for row in rows
    ]


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if not _is_null(inner)}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
