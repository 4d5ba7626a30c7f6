"""Answers that a data set marks as not learned are read only, whoever's mark it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.dataset import prepare
from lorakit.data.formats import to_sample
from lorakit.data.masking import IGNORE, WeightedRow, tokenize
from lorakit.data.prompts import read_prompts
from lorakit.data.samples import Sample
from lorakit.data.sources import Row
from lorakit.errors import InputError
from lorakit.objectives.registry import make_objective
from tiny import byte_tokenizer

WriteRows = Callable[..., Path]


def talk(first: dict[str, Any], second: dict[str, Any], user: Any = None) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Capital of Peru?", **(user or {})},
        {"role": "assistant", "content": "WRONG", **first},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "RIGHT", **second},
    ]


def sample(**values: Any) -> Sample:
    return to_sample(Row(values, Path("rows.jsonl"), 7))


def learned(found: Sample) -> str:
    tokenizer = byte_tokenizer()
    row = tokenize(found, tokenizer, 1000)
    assert "WRONG" in tokenizer.decode(row.input_ids)
    return str(tokenizer.decode([label for label in row.labels if label != IGNORE]))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"weight": 0}, {"weight": 1}),
        ({"weight": 0.0}, {"weight": 1.0}),
        ({"train": False}, {}),
        ({"training": False}, {"training": True}),
        ({"loss": False}, {"loss": True}),
        ({"loss_scale": 0}, {"loss_scale": 1}),
        ({"weight": None, "loss": False}, {"loss": None}),
        ({"train": False, "weight": 0}, {"train": True, "weight": 1}),
    ],
)
def test_an_answer_marked_as_not_learned_is_read_only(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    found = sample(messages=talk(first, second))
    assert learned(found) == "RIGHT<|im_end|>"
    assert all(message.keys() == {"role", "content"} for message in found.messages)
    assert found.reference == "RIGHT"
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {"from": names[m.pop("role")], "value": m.pop("content"), **m} for m in talk(first, second)
    ]
    assert sample(conversations=sharegpt) == found


def test_a_last_answer_that_is_not_learned_is_not_measured_either() -> None:
    found = sample(messages=talk({"weight": 1}, {"weight": 0}))
    assert (found.prompt, found.reference) == ([found.messages[0]], "WRONG")


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"train": 0.5}, {}, ["'train' of message 2", "0.5"]),
        ({"weight": 0.5, "loss_scale": 2}, {}, ["two weights", "weight: 0.5, loss_scale: 2"]),
        ({"weight": 0.5, "train": False}, {}, ["learned and as not learned"]),
        ({"weight": "0.5"}, {}, ["'weight' of message 2", "a number from 0 on"]),
        ({"loss_scale": float("inf")}, {}, ["loss_scale", "NaN or Inf"]),
        ({"train": "false"}, {}, ["'train' of message 2", "expected true or false"]),
        ({"weight": -1}, {}, ["'weight' of message 2"]),
        ({"weight": 1, "train": False}, {}, ["learned and as not learned", "weight", "train"]),
        ({"train": False}, {"loss": False}, ["every answer is marked as not learned"]),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
            {},
            ["message 2", "'train_detail'"],
        ),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(
    first: dict[str, Any], second: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError, match=r"^rows.jsonl:7: ") as caught:
        sample(messages=talk(first, second))
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("marks", [{"weight": 0.25}, {"loss_scale": 0.25, "loss": True}])
def test_a_weight_is_of_the_tokens_of_its_answer(marks: dict[str, Any]) -> None:
    found = sample(messages=talk(marks, {"weight": 1}))
    assert found.weights == ((1, 0.25),)
    tokenizer = byte_tokenizer()
    row = tokenize(found, tokenizer, 1000)
    assert isinstance(row, WeightedRow)
    [(begin, end, weight)] = row.weights
    assert tokenizer.decode(row.input_ids[begin:end]) == "WRONG<|im_end|>"
    assert weight == 0.25
    assert learned(found) == "WRONG<|im_end|>RIGHT<|im_end|>"
    plain = tokenize(sample(messages=talk({}, {})), tokenizer, 1000)
    assert (row.input_ids, row.labels) == (plain.input_ids, plain.labels)


def test_rows_with_weights_are_counted_and_refused_where_they_would_not_be_used(
    write_rows: WriteRows,
) -> None:
    path = str(write_rows([{"messages": talk({"weight": 0.3}, {})}] * 5))
    data = prepare(byte_tokenizer(), path, 0)
    assert any("5 rows (first: rows.jsonl:1) with answers whose loss" in n for n in data.notices)
    for objective in ("distill", "seq2seq"):
        with pytest.raises(InputError, match=r"rows.jsonl:1: .*weight 0.3.*and 4 more rows"):
            prepare(byte_tokenizer(), path, 0, as_learned=make_objective(objective).as_learned)
    judged = {"messages": talk({}, {"weight": 0.3}), "label": True}
    with pytest.raises(InputError, match=r"message 4 has the weight 0.3"):
        to_sample(Row(judged, Path("rows.jsonl"), 1), None, ["unpaired_preference"])
    pair = {"chosen": talk({}, {"weight": 2}), "rejected": talk({}, {})[:3]}
    pair["rejected"] += [{"role": "assistant", "content": "NO"}]
    with pytest.raises(InputError, match=r"message 4 has the weight 2"):
        to_sample(Row(pair, Path("rows.jsonl"), 1), None, ["preference"])


def test_rows_with_marks_are_counted(write_rows: WriteRows) -> None:
    rows = [{"messages": talk({"weight": i % 2}, {})} for i in range(5)]
    data = prepare(byte_tokenizer(), str(write_rows(rows)), 0)
    (notice,) = (line for line in data.notices if "marked as not learned" in line)
    assert "3 rows (first: rows.jsonl:1)" in notice


def test_message_fields_that_nothing_reads_are_counted(write_rows: WriteRows) -> None:
    rows = [{"messages": talk({"mood": "sad", "name": None}, {}, user={"weight": 1, "images": []})}]
    rows += [{"messages": talk({}, {"mood": i % 2 and "sad"})} for i in range(4)]
    data = prepare(byte_tokenizer(), str(write_rows(rows)), 0)
    found = {f.what.split("'")[1]: (f.count, f.first) for f in data.findings if "field" in f.what}
    assert found == {
        "mood": (5, ("rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3")),
        "weight": (1, ("rows.jsonl:1",)),
    }


def test_a_field_that_the_template_reads_is_read(write_rows: WriteRows) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m['role']", "(m.mood or m['role'])")
    data = prepare(tokenizer, str(write_rows([{"messages": talk({"mood": "sad"}, {})}])), 0)
    assert not [f for f in data.findings if "field" in f.what]
    assert "<|im_start|>sad\nWRONG" in tokenizer.decode(data.train[0].input_ids)


def test_prompts_to_answer_have_no_marks(write_rows: WriteRows) -> None:
    (prompt,) = read_prompts(str(write_rows([{"messages": talk({"weight": 0}, {})}])))
    assert prompt.messages == sample(messages=talk({}, {})).messages[:3]
