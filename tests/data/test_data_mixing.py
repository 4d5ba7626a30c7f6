"""Several sources: as often as they weigh, with their own columns, and no copy across the split."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.dataset import prepare
from lorakit.data.mixing import Source, mix
from lorakit.data.sources import file_sha256
from lorakit.errors import InputError
from lorakit.training.recipe import load_recipe
from tiny import byte_tokenizer

WriteRows = Callable[..., Path]


def rows(letter: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{letter}{i}", "completion": f"{letter}{i}"} for i in range(count)]


@pytest.fixture
def two(write_rows: WriteRows) -> tuple[str, str]:
    return str(write_rows(rows("a", 10), "a.jsonl")), str(write_rows(rows("b", 20), "b.jsonl"))


def test_sources_come_in_their_order_and_each_has_its_facts(two: tuple[str, str]) -> None:
    a, b = two
    mixed = mix([a, Path(b)])
    assert [sample.where for sample in mixed.samples][9:12] == [
        "a.jsonl:10",
        "b.jsonl:1",
        "b.jsonl:2",
    ]
    facts = [(fact.path, fact.rows, fact.sha256, fact.weight) for fact in mixed.facts]
    assert facts == [(a, 10, file_sha256(a), 1), (b, 20, file_sha256(b), 1)]
    assert mixed.notices == []


@pytest.mark.parametrize(
    ("weight", "used", "seen"),
    [(2, 20, 40), (0.5, 10, 10), (2.25, 20, 45), (0.05, 1, 1), (1, 20, 20)],
)
def test_a_weight_is_how_often_an_epoch_sees_a_row(
    two: tuple[str, str], weight: float, used: int, seen: int
) -> None:
    a, b = two
    data = prepare(byte_tokenizer(), [a, Source(b, weight)], 0)
    counts = Counter(row.where for row in data.train)
    of_b = {where: n for where, n in counts.items() if where.startswith("b")}
    assert (len(of_b), sum(of_b.values())) == (used, seen)
    assert max(of_b.values()) - min(of_b.values()) <= 1
    assert data.facts[1].rows == used
    assert data.facts[1].weight == weight
    if weight != 1:
        assert f"{b}: weight {weight:g}: {used} of 20 rows" in data.notices[0]
        assert f"an epoch sees {seen}," in data.notices[0]


def test_which_rows_a_weight_draws_depends_on_the_seed_alone(two: tuple[str, str]) -> None:
    a, b = two

    def drawn(seed: int, sources: list[Any]) -> list[str]:
        return [s.where for s in mix(sources, seed=seed).samples if s.where.startswith("b")]

    assert drawn(1, [Source(b, 0.5)]) == drawn(1, [a, Source(b, 0.5)]) != drawn(2, [Source(b, 0.5)])


def test_copies_never_stand_on_both_sides_and_are_held_out_once(two: tuple[str, str]) -> None:
    a, b = two
    data = prepare(byte_tokenizer(), [Source(a, 3), Source(b, 0.5)], 0.25)
    held = [row.where for row in data.eval]
    learned = {row.where for row in data.train}
    assert held
    assert len(held) == len(set(held))
    assert not learned & set(held)
    assert len(learned) + len(held) == 20
    assert [sample.where for sample in data.eval_samples] == held
    assert [sample.where for sample in data.train_samples] == [row.where for row in data.train]
    assert data.statistics()["train"].duplicates == 0


def test_a_source_may_have_columns_of_its_own(two: tuple[str, str], tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("mr,ref\nq,a\n")
    mapping = {"prompt": "mr", "completion": "ref"}
    mixed = mix([two[0], Source(str(table), columns=mapping)])
    assert mixed.samples[-1].reference == "a"
    renamed = mix([Source(two[0], columns={}), str(table)], mapping)
    assert len(renamed.samples) == 11


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "rows.jsonl" for folder in "xy"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(rows(path.parent.name, 1)[0]))
    assert [s.where for s in mix(paths).samples] == [f"{path}:1" for path in paths]
    assert mix(paths[0]).samples[0].where == "rows.jsonl:1"


def test_eval_may_be_several_sources(two: tuple[str, str], write_rows: WriteRows) -> None:
    more = write_rows(rows("a", 2), "more.jsonl")
    data = prepare(byte_tokenizer(), two[0], [two[1], str(more)])
    assert (len(data.train), len(data.eval)) == (10, 22)
    assert [fact.rows for fact in data.facts] == [10, 20, 2]
    assert any(f.count == 2 and f.what == "both learned from and held out" for f in data.findings)


def test_limit_is_of_each_source(two: tuple[str, str]) -> None:
    assert [s.where for s in mix(two, limit=1).samples] == ["a.jsonl:1", "b.jsonl:1"]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 1001])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(InputError, match=r"the weight of b\.jsonl is"):
        Source("b.jsonl", weight)


def test_a_recipe_and_its_command_line_take_lists_of_sources() -> None:
    base = {"model": "m", "data": {"train": "x"}, "output_dir": "o"}
    given = "data.train=[a.jsonl,{path: b.jsonl, weight: 0.5, columns: {prompt: mr}}]"
    recipe = load_recipe(base, [given, "data.eval=[c.jsonl, {path: d.jsonl}]"])
    assert recipe.data.train == ["a.jsonl", Source("b.jsonl", 0.5, {"prompt": "mr"})]
    assert recipe.data.eval == ["c.jsonl", Source("d.jsonl")]
    assert load_recipe(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_columns_that_no_one_reads_are_named(write_rows: WriteRows) -> None:
    path = write_rows([{"instruction": "q", "inputs": "x", "output": "a", "id": 1, "note": None}])
    assert mix(path).notices == [f"{path}: 2 columns not read: inputs (did you mean 'input'?), id"]
