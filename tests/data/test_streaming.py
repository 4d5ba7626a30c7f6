"""Rows that are read as they come: each once in a pass, and found again at every place."""

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorakit.data.dataset import PreparedData, prepare
from lorakit.data.sources import read_rows, rows_from_python
from lorakit.data.streaming import BatchStream, Place, RowStream
from lorakit.errors import InputError
from tiny import byte_tokenizer

WriteRows = Callable[..., Path]
ROWS = [{"text": f"row {i} " + "x" * (i * 7 % 40)} for i in range(50)]


def prepared(path: str | Path, **options: Any) -> PreparedData:
    settings = {"buffer_size": 10, "kinds": ("text",), "max_length": 64} | options
    return prepare(byte_tokenizer(), str(path), 0, **settings)  # type: ignore[arg-type]


def stream_of(path: str | Path, **options: Any) -> RowStream:
    stream = prepared(path, **options).stream
    assert stream is not None
    return stream


def lines_of(stream: RowStream, passes: int = 0, begin: int = 0, every: int = 1) -> list[int]:
    return [row.line for row, _ in stream.rows(passes, begin, every)]


@pytest.fixture
def path(write_rows: WriteRows) -> Path:
    return write_rows(ROWS)


def test_a_pass_has_each_row_once_in_an_order_of_its_own(path: Path):
    stream = stream_of(path)
    first, again, second = lines_of(stream), lines_of(stream), lines_of(stream, 1)
    assert first == again
    assert first != second
    assert sorted(first) == sorted(second) == list(range(1, 51))
    assert all(line <= at + 11 for at, line in enumerate(first)), "no row is read ahead of that"
    assert lines_of(stream_of(path, seed=7)) != first
    assert lines_of(stream_of(path, buffer_size=1)) == list(range(1, 51))
    assert sorted(lines_of(stream_of(path, limit=5))) == [1, 2, 3, 4, 5]


def test_processes_have_rows_of_their_own(path: Path):
    stream = stream_of(path)
    shares = [lines_of(stream, 0, part, 3) for part in range(3)]
    assert sorted(line for share in shares for line in share) == list(range(1, 51))


@pytest.mark.parametrize("budget", [None, 150])
def test_from_every_place_on_the_batches_are_the_same(path: Path, budget: int | None):
    rows = stream_of(path, too_long="split", max_length=20)
    stream = BatchStream(rows, 4, budget)
    places, batches = [], []
    for _ in range(60):
        places.append(stream.place)
        batches.append([row.input_ids for row in stream.next_batch()])
    assert places[-1].passes >= 1
    assert any(place.parts for place in places), "a place may lie within a long text"
    if budget:
        assert all(sum(map(len, batch)) <= budget for batch in batches)
    else:
        assert {len(batch) for batch in batches} == {4}
    for at in (0, 1, 17, 40, 59):
        again = BatchStream(rows, 4, budget, place=places[at])
        assert [r.input_ids for r in again.next_batch()] == batches[at]
        rest = [[r.input_ids for r in again.next_batch()] for _ in range(59 - at)]
        assert rest == batches[at + 1 :]


def test_padded_batches_count_what_they_are_padded_to(path: Path):
    stream = BatchStream(stream_of(path), 1, 200, padded=True)
    for _ in range(30):
        batch = stream.next_batch()
        assert len(batch) * max(map(len, batch)) <= 200


def written(form: str, folder: Path) -> str:
    """The rows in one of the forms that are read as they come."""
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    half = len(ROWS) // 2
    if form == "gz":
        (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        return str(folder / "rows.jsonl.gz")
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=7)
        return str(folder / "rows.parquet")
    if form == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
        return str(folder / "saved")
    shards = folder / "shards"
    shards.mkdir()
    for name, rows in (("train-0.jsonl", ROWS[:half]), ("train-1.jsonl", ROWS[half:])):
        (shards / name).write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (shards / "test.jsonl").write_text('{"text": "not to be learned"}\n')
    return str(shards)


@pytest.mark.parametrize("form", ["gz", "parquet", "saved", "shards"])
def test_all_forms_have_the_rows_that_reading_them_whole_has(form: str, tmp_path: Path):
    place = written(form, tmp_path)
    stream = stream_of(place, buffer_size=1)
    found = [(row.where, row.values) for row, _ in stream.rows(0, 0, 1)]
    assert found == [(row.where, row.values) for row in read_rows(place)]


def test_an_iterable_data_set_from_python_is_read_as_it_comes():
    drawn: list[int] = []

    def rows() -> Any:
        for i, row in enumerate(ROWS * 100):
            drawn.append(i)
            yield row

    given = datasets.IterableDataset.from_generator(rows)
    with rows_from_python(given) as names:
        stream = BatchStream(stream_of(names["data.train"], buffer_size=1), 4)
        assert len(stream.next_batch()) == 4
    assert len(drawn) < 600, "the first rows were looked at, and those of a batch read"


def test_what_is_said_of_rows_is_of_the_first_ones(write_rows: WriteRows):
    data = prepared(write_rows(ROWS * 10))
    assert len(data.train) == 256
    assert [fact.rows for fact in data.facts] == [0]
    assert data.facts[0].sha256 == prepared(write_rows(ROWS * 10), buffer_size=None).facts[0].sha256
    assert any("first 256 rows" in notice for notice in data.notices)


def test_rows_that_are_too_long_are_left_out_and_counted(write_rows: WriteRows):
    rows = stream_of(write_rows([*ROWS, {"text": "y" * 100}]), too_long="drop")
    stream = BatchStream(rows, 1)
    found = [stream.next_batch()[0].where for _ in range(51)]
    assert "rows.jsonl:51" not in found
    assert len(set(found)) == 50
    assert "1 row left out" in rows.notice()[0]
    assert "rows.jsonl:51" in rows.notice()[0]


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("rows.jsonl", [*ROWS * 6, "broken"], "rows.jsonl:301.*broken JSON"),
        ("rows.jsonl", [*ROWS * 6, {"question": "x"}], "rows.jsonl:301: its columns"),
        ("rows.jsonl", [*ROWS * 6, b"\xff"], "rows.jsonl:301: not UTF-8"),
        ("rows.jsonl", [], "holds no rows"),
        ("rows.csv", ["text", "a"], "data.streaming reads .jsonl"),
        ("rows.txt", ["a text"], "data.streaming reads .jsonl"),
        ("rows.jsonl.gz", ["text"], "damaged or incomplete gzip"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(
    name: str, rows: list[Any], words: str, tmp_path: Path
):
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    text = b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=words):
        list(islice(BatchStream(stream_of(tmp_path / name), 1)._rows, 400))


def test_a_pass_without_a_row_to_learn_ends_it(write_rows: WriteRows):
    path = write_rows([{"text": "short enough"}])
    stream = BatchStream(stream_of(path), 2, part=1, of=2, place=Place())
    with pytest.raises(InputError, match="no row that can be learned by process 2 of 2"):
        stream.next_batch()
