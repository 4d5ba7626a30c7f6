"""What is found in rows and counted: each finding on rows that have it, and the numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.dataset import PreparedData, prepare
from lorakit.data.findings import Finding

WriteRows = Callable[..., Path]


def row(number: int, answer: str = "yes") -> dict[str, Any]:
    return {"prompt": f"question {number}", "completion": answer}


def found(data: PreparedData) -> dict[str, Finding]:
    return {finding.what: finding for finding in data.findings if finding.count}


def test_rows_without_fault_have_no_findings_and_all_that_was_looked_for_is_listed(
    tokenizer: Any, write_rows: WriteRows
) -> None:
    data = prepare(tokenizer, write_rows([row(n) for n in range(5)]), 0)
    assert found(data) == {}
    assert len(data.findings) == 8


def test_cut_rows_are_counted_and_the_length_that_keeps_all_is_named(
    tokenizer: Any, write_rows: WriteRows
) -> None:
    rows = [row(1), row(2, "long " * 100), row(3, "long " * 150)]
    data = prepare(tokenizer, write_rows(rows), 0, max_length=64)
    [finding] = found(data).values()
    assert finding.line.startswith("2 of 3 rows are longer than max_length 64 and cut at the end")
    assert finding.first == ("rows.jsonl:2", "rows.jsonl:3")
    whole = int(finding.cure.rpartition("=")[2].split()[0])
    assert found(prepare(tokenizer, write_rows(rows), 0, max_length=whole)) == {}
    assert found(prepare(tokenizer, write_rows(rows), 0, max_length=whole - 1))


def test_repeated_rows_are_counted_beyond_the_first(tokenizer: Any, write_rows: WriteRows) -> None:
    data = prepare(tokenizer, write_rows([row(1), row(2), row(1), row(1), row(1, "no")]), 0)
    [finding] = found(data).values()
    assert finding.line.startswith("2 of 5 rows are the same as an earlier row")
    assert finding.first == ("rows.jsonl:3", "rows.jsonl:4")


def test_rows_that_are_held_out_too_are_counted(tokenizer: Any, write_rows: WriteRows) -> None:
    train = write_rows([row(n) for n in range(10)], "train.jsonl")
    held = write_rows([row(0), row(1), row(3, "new")], "held.jsonl")
    [finding] = found(prepare(tokenizer, train, str(held))).values()
    assert (finding.count, finding.of, finding.first[0]) == (2, 10, "train.jsonl:1")
    assert "both learned from and held out" in finding.line


def test_empty_answers_are_counted(tokenizer: Any, write_rows: WriteRows) -> None:
    findings = found(prepare(tokenizer, write_rows([row(1), row(2, " ")]), 0))
    finding = findings["without an answer's text"]
    assert finding.line.startswith("1 of 2 rows is without an answer's text (first: rows.jsonl:2)")


def test_a_bos_that_the_text_and_the_template_both_bring_is_counted(
    bos_tokenizer: Any, write_rows: WriteRows
) -> None:
    twice = write_rows([{"text": "<s>hello"}, {"text": "hello"}])
    [finding] = found(prepare(bos_tokenizer, twice, 0)).values()
    assert (finding.what, finding.count) == ("begun with two BOS tokens", 1)


def test_a_turn_that_the_template_leaves_open_is_counted(
    tokenizer: Any, write_rows: WriteRows
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n"
        "{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    turns = [{"role": role, "content": f"the {role} speaks"} for role in ("user", "assistant") * 2]
    path = write_rows([{"messages": turns[:2]}, {"messages": turns}])
    data = prepare(tokenizer, path, 0)
    left_open = "left without an end token after an answer"
    assert found(data)[left_open].first == ("rows.jsonl:2",)
    # A row that is cut in its answer is counted as cut alone.
    path = write_rows([{"messages": turns[:2]}])
    assert left_open not in found(prepare(tokenizer, path, 0, max_length=len(data.train[0]) - 1))


def test_the_numbers_are_those_of_the_rows(tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows([row(n, "word " * (n % 40 + 1)) for n in range(200)])
    data = prepare(tokenizer, path, 0.25, max_length=60)
    for part, rows in (("train", data.train), ("eval", data.eval)):
        numbers, lengths = data.statistics()[part], sorted(map(len, rows))
        assert (numbers.rows, numbers.tokens) == (len(rows), sum(lengths))
        assert numbers.supervised_share == sum(r.supervised for r in rows) / sum(lengths)
        assert numbers.truncated == sum(len(r) == 60 and r.cut > 0 for r in rows)
        assert (numbers.lengths["min"], numbers.lengths["max"]) == (lengths[0], lengths[-1])
        middle = numbers.lengths["p50"]
        assert sum(n < middle for n in lengths) <= len(rows) / 2
        assert sum(n > middle for n in lengths) <= len(rows) / 2
        assert 2 <= len(numbers.histogram) <= 12
        for low, high, count in numbers.histogram:
            assert count == sum(low <= n < high for n in lengths)
        assert sum(count for *_, count in numbers.histogram) == len(rows)


@pytest.mark.parametrize("lengths", [[1], [1, 12], [7] * 3, [1, 100_000]])
def test_a_histogram_has_few_bins_whatever_the_lengths(
    tokenizer: Any, write_rows: WriteRows, lengths: list[int]
) -> None:
    path = write_rows([{"text": "a " * n} for n in lengths])
    histogram = prepare(tokenizer, path, 0, max_length=200_000).statistics()["train"].histogram
    assert 1 <= len(histogram) <= 12
    assert sum(count for *_, count in histogram) == len(lengths)
