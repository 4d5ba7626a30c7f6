"""Sources of more than one file, packed ones, and those that the library `datasets` has saved."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorakit.data.dataset import load_samples, prepare
from lorakit.data.formats import to_sample
from lorakit.data.sources import file_sha256, read_rows, read_source
from lorakit.errors import InputError
from lorakit.objectives.classification import labelled_samples
from lorakit.objectives.run_request import RunRequest
from tiny import byte_tokenizer

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def line(prompt: str) -> str:
    return json.dumps({"prompt": prompt, "completion": "a"}) + "\n"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "part-2.jsonl").write_text(line("c"))
    (folder / "part-1.jsonl").write_text(line("a") + line("b"))
    return folder


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(shards: Path) -> None:
    found = read_source(shards)
    assert [row.values["prompt"] for row in found.rows] == ["a", "b", "c"]
    assert [row.where for row in found.rows] == [
        "part-1.jsonl:1",
        "part-1.jsonl:2",
        "part-2.jsonl:1",
    ]
    assert found.notices == []


def test_a_folder_hash_is_over_names_and_hashes_of_its_files(shards: Path) -> None:
    names = ["part-1.jsonl", "part-2.jsonl"]
    text = "".join(f"{file_sha256(shards / name)}  {name}\n" for name in names)
    before = read_source(shards).sha256
    assert before == hashlib.sha256(text.encode()).hexdigest()
    (shards / "part-2.jsonl").rename(shards / "part-3.jsonl")
    assert read_source(shards).sha256 != before


def test_what_is_left_out_of_a_folder_is_said(shards: Path) -> None:
    (shards / "README.md").write_text("x")
    (shards / "_SUCCESS").write_text("")
    (shards / "more").mkdir()
    (notice,) = read_source(shards).notices
    assert "of its entries 2 are read (.jsonl), 3 are left out" in notice
    assert "README.md, _SUCCESS, more" in notice


def test_packed_and_plain_files_of_one_kind_may_stand_together(shards: Path) -> None:
    (shards / "part-3.jsonl.gz").write_bytes(gzip.compress(line("d").encode()))
    assert [row.values["prompt"] for row in read_rows(shards)] == ["a", "b", "c", "d"]
    assert read_rows(shards)[-1].where == "part-3.jsonl.gz:1"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl.gz", line("q")),
        ("rows.JSON.GZ", f"[{line('q')}]"),
        ("rows.csv.gz", "prompt,completion\nq,a\n"),
        ("rows.tsv.gz", "prompt\tcompletion\nq\ta\n"),
    ],
)
def test_packed_files_are_read_like_plain_ones(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()))
    assert [row.values for row in read_rows(path)] == [{"prompt": "q", "completion": "a"}]


def test_much_text_that_packs_well_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(line("the same question " * 50).encode() * 20_000))
    assert path.stat().st_size * 100 < 18_000_000
    assert len(read_rows(path)) == 20_000


def test_parquet_shards_have_their_own_row_numbers(tmp_path: Path) -> None:
    for name in ("b", "a"):
        pq.write_table(pa.table({"text": [name, name]}), tmp_path / f"{name}.parquet")
    assert [row.where for row in read_rows(tmp_path)] == [
        "a.parquet:1",
        "a.parquet:2",
        "b.parquet:1",
        "b.parquet:2",
    ]


def test_nulls_that_arrow_fills_in_are_taken_away(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": "z"}}}
    rows = [
        {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [c]}]}
        for c in (call, other)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    samples = [to_sample(row) for row in read_rows(tmp_path / "rows.parquet")]
    assert [s.messages[1]["tool_calls"] for s in samples] == [[call], [other]]
    assert samples[0].messages[0] == TALK[0]


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"messages": TALK}] * 3).save_to_disk(tmp_path / "saved")
    found = read_source(tmp_path / "saved")
    assert [row.values for row in found.rows] == [{"messages": TALK}] * 3
    assert [row.where for row in found.rows] == ["saved:1", "saved:2", "saved:3"]
    assert found.sha256 == read_source(str(tmp_path / "saved")).sha256


def test_of_saved_splits_train_is_read_unless_another_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    (row,) = read_rows(tmp_path / "saved")
    assert (row.values, row.where) == ({"text": "train"}, "saved:train:1")
    (row,) = read_rows(f"{tmp_path}/saved:test")
    assert (row.values, row.where) == ({"text": "test"}, "saved:test:1")


def in_python(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own, where libraries read their settings anew."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


READ = """
import sys
{before}
from lorakit.data.sources import read_source
from lorakit.errors import InputError
for path in {paths}:
    try:
        found = read_source(path)
        print([(row.where, row.values) for row in found.rows], len(found.sha256))
    except InputError as error:
        print(error)
"""


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """The local cache of the hub, as `load_dataset("owner/name")` leaves it."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text(line("q"))
    files, cache = str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")
    datasets.load_dataset("json", data_files=files, cache_dir=cache)
    made = next((tmp_path / "cache" / "json").glob("*/*/*/dataset_info.json")).parent
    kept = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / made.name
    shutil.copytree(made, kept)
    (kept / "json-train.arrow").rename(kept / "name-train.arrow")
    info: dict[str, Any] = json.loads((kept / "dataset_info.json").read_text())
    info |= {"builder_name": "name", "dataset_name": "name", "config_name": "default"}
    (kept / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path / "cache"


def test_a_hub_id_is_read_from_the_cache_and_what_is_not_there_is_said(hub_cache: Path) -> None:
    paths = ["owner/name", "owner/name:train", "owner/name:test", "owner/other"]
    out = in_python(READ.format(before="", paths=paths), HF_DATASETS_CACHE=str(hub_cache))
    first, second, no_split, no_such = out.splitlines()
    where_and_values = [("owner/name:train:1", {"prompt": "q", "completion": "a"})]
    assert first == second == f"{where_and_values} 64"
    assert "its split 'test' cannot be loaded" in no_split
    assert "['train']" in no_split
    assert no_such.startswith("owner/other: is not a file here, and as a data set of the hub")
    assert "check the name and the network, or give a file" in no_such


def test_without_the_library_it_is_said_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    before = "sys.modules['datasets'] = None"
    out = in_python(READ.format(before=before, paths=[str(tmp_path), "owner/name"]))
    assert out.count("pip install 'lorakit[data]'") == 2


@pytest.mark.parametrize(
    "path",
    ["data/rows.txt", "data/rows.jsonl", "runs/rows.zip", "./a/b", "/a/b", "a/b/c", "tests/x"],
)
def test_a_mistyped_path_is_not_looked_up_on_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such file|not a known file type") as caught:
        read_source(path)
    assert "hub" not in str(caught.value)


def test_a_link_to_a_file_is_that_file(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(shards / "part-2.jsonl")
    assert [row.where for row in read_rows(tmp_path / "link.jsonl")] == ["link.jsonl:1"]


def in_parts(folder: Path, *names: str, suffix: str = ".jsonl") -> Path:
    """A folder with a file of two rows for each name, whose prompts say the name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}{suffix}").write_text(line(f"{name} 1") + line(f"{name} 2"))
    return folder


def asked(rows: Any) -> set[str]:
    return {row.prompt[0]["content"].rpartition(" ")[0] for row in rows}


@pytest.mark.parametrize(
    ("names", "learned", "held_out"),
    [
        (["train", "test", "validation"], "train", "validation"),
        (["train-00001", "valid-00001", "test-00001"], "train-00001", "valid-00001"),
        (["orders_train", "orders_dev"], "orders_train", "orders_dev"),
        (["Train", "Val"], "Train", "Val"),
        (["训练集", "验证集", "测试集"], "训练集", "验证集"),
        (["orders", "test", "heldout"], "orders", "heldout"),
        (["train/part", "validation/part", "test/part"], "train/part", "validation/part"),
        (["train", "test"], "train", "train"),
        (["pretraining_notes", "latest"], None, None),
    ],
)
def test_what_is_named_for_measuring_is_not_learned(
    tmp_path: Path, names: list[str], learned: str | None, held_out: str | None
) -> None:
    folder = in_parts(tmp_path / "set", *names)
    data = prepare(byte_tokenizer(), str(folder), 0.5)
    if learned is None:
        assert len(data.train) + len(data.eval) == 4
        assert not any("left out" in line for line in data.notices)
        return
    assert asked(data.train_samples) == {learned}
    assert asked(data.eval_samples) == {held_out}
    left = [line for line in data.notices if "left out" in line]
    assert left
    assert any(name in left[0] for name in names if name != learned)
    if held_out != learned:
        assert [fact.path for fact in data.facts] == [str(folder), f"{folder}:validation"]
        assert any(f"eval: {folder}:validation is held out" in line for line in data.notices)
        assert len(data.train) == 2
        assert prepare(byte_tokenizer(), str(folder), 0).eval == []


def test_a_part_can_be_named_and_measuring_takes_what_is_for_it(tmp_path: Path) -> None:
    folder = in_parts(tmp_path / "set", "train", "test", "validation")
    prompts = [row.values["prompt"] for row in read_rows(f"{folder}:test")]
    assert prompts == ["test 1", "test 2"]
    assert asked(load_samples(folder)) == {"test"}
    assert asked(prepare(byte_tokenizer(), str(folder), str(folder)).eval_samples) == {"validation"}
    for only in ("test", "validation"):
        with pytest.raises(InputError, match=rf"for {only} .*none for training"):
            prepare(byte_tokenizer(), str(in_parts(tmp_path / only, only)), 0)
    with pytest.raises(InputError, match="no files named for 'test'"):
        read_rows(f"{in_parts(tmp_path / 'two', 'train')}:test")


def test_parts_may_be_of_several_kinds(tmp_path: Path) -> None:
    folder = in_parts(tmp_path / "set", "train")
    (folder / "test.csv").write_text("prompt,completion\nq,a\n")
    assert len(read_rows(folder)) == 2


def test_saved_splits_for_validation_are_held_out(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = tmp_path / "saved"
    splits = {
        name: datasets.Dataset.from_list([{"prompt": f"{name} 1", "completion": "a"}])
        for name in ("train", "test", "validation")
    }
    datasets.DatasetDict(splits).save_to_disk(saved)
    data = prepare(byte_tokenizer(), str(saved), 0.1)
    assert (asked(data.train_samples), asked(data.eval_samples)) == ({"train"}, {"validation"})
    assert asked(load_samples(saved)) == {"test"}
    assert any("left out are test, validation" in line for line in data.notices)


def test_a_classifier_holds_out_a_folder_s_own_part(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        rows = [{"text": f"{name} {label}", "label": label} for label in "ab"]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    train, held, facts, notices = labelled_samples(RunRequest("m", None, str(tmp_path)), "SEQ_CLS")
    assert {sample.texts[0] for sample in train} == {"train a", "train b"}
    assert {sample.texts[0] for sample in held} == {"validation a", "validation b"}
    assert [fact.path for fact in facts] == [str(tmp_path), f"{tmp_path}:validation"]
    assert any("test.jsonl" in line for line in notices)
