import csv
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.formats import to_sample
from lorakit.data.sources import file_sha256, read_rows
from lorakit.errors import InputError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ü\u2028", "completion": "d\ne"}]

# No NUL, and no lone surrogates: neither is text in a UTF-8 file.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def lines(path: Path) -> list[int]:
    return [row.line for row in read_rows(path)]


def values(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(path)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_rows_know_the_line_they_start_at(
    tmp_path: Path, indent: int | None, encoding: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=indent), encoding=encoding)
    assert values(path) == ROWS
    assert lines(path) == ([1, 1] if indent is None else [2, 6])
    assert read_rows(path)[1].where == f"rows.json:{lines(path)[1]}"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
def test_json_lines_skip_blank_lines_and_count_them(
    tmp_path: Path, newline: str, suffix: str
) -> None:
    path = tmp_path / f"rows{suffix}"
    text = newline.join(["", json.dumps(ROWS[0]), "  ", json.dumps(ROWS[1], ensure_ascii=False)])
    path.write_bytes(text.encode())
    assert values(path) == ROWS
    assert lines(path) == [2, 4]


def test_csv_records_over_several_lines_are_one_row_each(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\r\n"a\r\nb",c\r\n\r\nd,"e ""f"""\r\n')
    assert values(path) == [
        {"prompt": "a\r\nb", "completion": "c"},
        {"prompt": "d", "completion": 'e "f"'},
    ]
    assert lines(path) == [2, 5]


def test_tsv_is_csv_with_tabs(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("prompt\tcompletion\na, b\tc\n")
    assert values(path) == [{"prompt": "a, b", "completion": "c"}]


def test_parquet_rows_are_numbered_and_ignore_folder_names(tmp_path: Path) -> None:
    path = tmp_path / "year=2024" / "rows.parquet"
    path.parent.mkdir()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}] * 2), path)
    assert values(path) == [{"messages": messages}] * 2
    assert lines(path) == [1, 2]


@given(st.lists(st.dictionaries(TEXT, TEXT | st.none() | st.booleans() | st.integers())))
def test_json_lines_round_trip_any_rows(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes("\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
        if rows:
            assert values(path) == rows
            assert lines(path) == list(range(1, len(rows) + 1))
        else:
            with pytest.raises(InputError, match="no rows"):
                read_rows(path)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1))
def test_csv_round_trips_any_texts(pairs: list[tuple[str, str]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("a", "b"), *pairs])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        path.write_bytes(buffer.getvalue().encode())
        assert values(path) == [{"a": a, "b": b} for a, b in pairs]


@given(st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet"]), st.binary(max_size=64))
def test_random_bytes_give_rows_or_one_clear_line(suffix: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(data)
        refusal = ""
        try:
            rows = read_rows(path)
        except InputError as error:
            rows, refusal = [], str(error)
    assert rows or f"rows{suffix}" in refusal
    assert "\n" not in refusal


MALFORMED = [
    ("rows.txt", b"{}", ["'.txt'", ".jsonl", ".parquet"]),
    ("rows", b"{}", ["suffix", ".jsonl"]),
    ("rows.jsonl", b"", ["no rows"]),
    ("rows.jsonl", b"\n \n", ["no rows"]),
    ("rows.json", b"", ["no rows"]),
    ("rows.json", b" [ ] ", ["no rows"]),
    ("rows.csv", b"", ["no rows"]),
    ("rows.csv", b"prompt,completion\n", ["no rows"]),
    ("rows.json", b'{"data": []}', ["rows.json:1", "one array", ".jsonl"]),
    ("rows.json", b'[{"a": 1},\n 5]', ["rows.json:2", "must be an object"]),
    ("rows.json", b'[{"a": 1}\n {"a": 2}]', ["rows.json:2", "expected ',' or ']'"]),
    ("rows.json", b'[{"a": 1},\n]', ["rows.json:2:1", "broken JSON"]),
    ("rows.json", b'[{"a": 1}', ["rows.json:1", "broken JSON"]),
    ("rows.json", b"[", ["rows.json:1:2", "broken JSON"]),
    ("rows.json", b'[{"a": 1}]\n[]', ["after the array"]),
    ("rows.json", b'[\n{"a":\n 1,}]', ["rows.json:3:", "broken JSON"]),
    ("rows.json", b'[{"a": ' + b"[" * 200_000, ["rows.json:1", "nested too deeply"]),
    ("rows.jsonl", b'{"a": ' * 200_000, ["rows.jsonl:1", "nested too deeply"]),
    ("rows.jsonl", b'{"a": 1}\n{"a": 1', ["rows.jsonl:2:8", "broken JSON"]),
    ("rows.jsonl", b'{"a": 1} {"a": 2}', ["rows.jsonl:1:10", "one object a line"]),
    ("rows.jsonl", b'[{"a": 1}]', ["rows.jsonl:1", "rename it to .json"]),
    ("rows.jsonl", b"[\n", ["rows.jsonl:1", "rename it to .json"]),
    ("rows.jsonl", b"null", ["must be an object"]),
    ("rows.jsonl", b'{"a": NaN}', ["NaN is not JSON"]),
    ("rows.jsonl", b'{"a": -Infinity}', ["-Infinity is not JSON"]),
    ("rows.jsonl", b'{"a": 1, "a": 2}', ["'a' occurs twice"]),
    ("rows.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ["rows.jsonl:1", "4300 digits"]),
    ("rows.jsonl", b'{"a": "b"}\n{"a": "\xe9"}', ["rows.jsonl:2", "UTF-8"]),
    ("rows.jsonl", '{"a": 1}'.encode("utf-16"), ["rows.jsonl:1", "UTF-8"]),
    ("rows.csv", b"a,b\n1,\0\n", ["rows.csv:2", "NUL"]),
    ("rows.csv", b"a,a\n1,2\n", ["rows.csv:1", "two columns are named 'a'"]),
    ("rows.csv", b"a;b\n1;2\n", ["rows.csv:1", "';'", "commas"]),
    ("rows.csv", b"a,b\n1,2\n1,2,3\n", ["rows.csv:3", "3 columns", "header has 2"]),
    ("rows.csv", b"a,b\n1\n", ["rows.csv:2", "1 columns", "header has 2"]),
    ("rows.csv", b'a,b\n1,2\n1,"2\n\n', ["rows.csv:3", "broken record", "quotes"]),
    ("rows.csv", b'a,b\n1,"2"3\n', ["rows.csv:2", "broken record"]),
    ("rows.csv", b"a,b\n1," + b"x" * 200_000, ["rows.csv:2", "field larger", ".jsonl"]),
    ("rows.parquet", b"", ["rows.parquet", "not a readable Parquet file"]),
    ("rows.parquet", b"PAR1 nonsense PAR1", ["not a readable Parquet file"]),
]


@pytest.mark.parametrize(("name", "data", "expected"), MALFORMED)
def test_a_malformed_file_is_refused_in_one_line(
    tmp_path: Path, name: str, data: bytes, expected: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert [word for word in expected if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_a_parquet_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_rows(path)


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "orders.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"no such file \(did you mean 'orders.jsonl'\?\)"):
        read_rows(tmp_path / "order.jsonl")


@pytest.mark.parametrize("path", ["src", "missing/rows.jsonl", "x" * 5000 + ".jsonl", "a\0b.jsonl"])
def test_a_path_that_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(InputError):
        read_rows(path)
    with pytest.raises(InputError):
        file_sha256(path)


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"a\r\n")
    assert file_sha256(path) == hashlib.sha256(b"a\r\n").hexdigest()


def test_importing_the_data_modules_imports_nothing_heavy() -> None:
    code = (
        "import sys, lorakit.data.dataset, lorakit.data.batches; "
        "print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt, completion\nQ1, A1\n", {"prompt": "Q1", "completion": "A1"}),
        ('prompt, completion\n"Q, 1", "A ""1"""\n', {"prompt": "Q, 1", "completion": 'A "1"'}),
        (" prompt ,completion\t\nQ1, A1\n", {"prompt": "Q1", "completion": " A1"}),
        ("\ufeff\ufeffprompt,completion\u00a0\nQ1,A1\n", {"prompt": "Q1", "completion": "A1"}),
        ('\ufeff"prompt","completion"\r\nQ1,A1\r\n', {"prompt": "Q1", "completion": "A1"}),
    ],
)
def test_blanks_around_the_names_of_columns_are_no_part_of_them(
    tmp_path: Path, text: str, expected: dict[str, str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert values(path) == [expected]


def test_the_header_of_a_wide_table_is_checked_in_linear_time(tmp_path: Path) -> None:
    names = [f"column_{i}" for i in range(30_000)]
    path = tmp_path / "wide.csv"
    path.write_text(",".join(names) + "\n" + ",".join("x" * len(names)) + "\n")
    began = time.process_time()
    (row,) = read_rows(path)
    with pytest.raises(InputError, match="fit no format"):
        to_sample(row)
    with pytest.raises(InputError, match="no column 'column_x'"):
        to_sample(row, {"text": "column_x"})
    assert time.process_time() - began < 15  # of each pair of names it took half a minute
    assert len(row.values) == len(names)


def test_what_pandas_has_for_a_missing_value_is_null(tmp_path: Path) -> None:
    nan = float("nan")
    table = {"instruction": ["q", "r"], "input": [nan, nan], "output": ["a", "b"]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    assert [row["input"] for row in values(tmp_path / "rows.parquet")] == [None, None]
