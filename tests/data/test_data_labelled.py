"""Rows with labels: which columns are taken, which labels there are, and where each stands."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.batches import LabelCollator
from lorakit.data.label_rows import tokenize_sequence, tokenize_words
from lorakit.data.labelled import (
    LabelledSample,
    collect_labels,
    hold_out,
    notice_labels,
    read_labelled,
)
from lorakit.data.masking import IGNORE
from lorakit.errors import InputError
from tiny import byte_tokenizer, letter_tokenizer


def read(folder: Path, task: str, *rows: dict[str, Any], **columns: str) -> list[LabelledSample]:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return read_labelled(path, task, columns or None)


@pytest.mark.parametrize(
    ("row", "columns", "texts"),
    [
        ({"text": "a", "label": 1}, {}, ("a",)),
        ({"text": "a", "text_pair": "b", "label": 1}, {}, ("a", "b")),
        ({"text": "a", "text_pair": None, "label": 1}, {}, ("a",)),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, {}, ("a", "b")),
        ({"review": "a", "stars": 1}, {"text": "review", "label": "stars"}, ("a",)),
        (
            {"premise": "a", "hypothesis": "b", "gold": 1},
            {"text": "premise", "text_pair": "hypothesis", "label": "gold"},
            ("a", "b"),
        ),
    ],
)
def test_a_text_or_a_pair_is_found_by_its_columns(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], texts: tuple[str, ...]
):
    [sample] = read(tmp_path, "SEQ_CLS", row, **columns)
    assert sample == LabelledSample(texts, (1,), "rows.jsonl:1")


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("SEQ_CLS", {"text": "a"}, r"text\+label"),
        ("SEQ_CLS", {"text": "a", "label": None}, "'label' is empty"),
        ("SEQ_CLS", {"text": "a", "label": " "}, "'label' is empty"),
        ("SEQ_CLS", {"text": "a", "label": 0.5}, "0.5, a number with a point"),
        ("SEQ_CLS", {"text": "a", "label": ["x"]}, "'label' is a list"),
        ("SEQ_CLS", {"text": "", "label": "x"}, "'text' is empty"),
        ("SEQ_CLS", {"text": 5, "label": "x"}, "'text' is a number"),
        ("SEQ_CLS", {"text": "\ud83d", "label": "x"}, "surrogate"),
        ("SEQ_CLS", {"text": "a", "sentence1": "a", "sentence2": "b", "label": 1}, "say which"),
        ("TOKEN_CLS", {"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        ("TOKEN_CLS", {"tokens": "a b", "tags": ["O"]}, "'tokens' is a string"),
        ("TOKEN_CLS", {"tokens": [], "tags": []}, "'tokens' is empty"),
        ("TOKEN_CLS", {"tokens": ["a"], "tags": [None]}, r"tags\[0\] is empty"),
        ("TOKEN_CLS", {"tokens": ["a", 1], "tags": [0, 0]}, r"tokens\[1\] is a number"),
        ("TOKEN_CLS", {"tokens": ["a"], "tags": [0], "ner_tags": [0]}, "say which"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, task: str, row: dict[str, Any], words: str
):
    good = {"SEQ_CLS": {"text": "a", "label": "x"}, "TOKEN_CLS": {"tokens": ["a"], "tags": ["O"]}}
    with pytest.raises(InputError, match=words) as refused:
        read(tmp_path, task, good[task], row)
    assert str(refused.value).startswith("rows.jsonl:2: ")


def labelled(*labels: Any) -> list[LabelledSample]:
    return [LabelledSample((f"text {i}",), (x,), f"f:{i + 1}") for i, x in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("pear", "apple", "pear"), ("apple", "pear")),
        ((10, 9, 2), ("2", "9", "10")),
        (("10", "9", "2"), ("2", "9", "10")),
        ((True, False), ("false", "true")),
    ],
)
def test_labels_are_numbered_by_size_or_alphabet(labels: tuple[Any, ...], names: tuple[str, ...]):
    found = collect_labels(labelled(*labels), [])
    assert found.names == names
    assert found.to_dict()["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert sum(found.counts.values()) == len(labels)


def test_labels_that_cannot_be_learned_are_refused():
    with pytest.raises(InputError, match=r"f:1: all training rows have the label 'a'"):
        collect_labels(labelled("a", "a"), [])
    with pytest.raises(InputError, match=r"f:2: no training row has the label 'aple'.*'apple'"):
        collect_labels(labelled("apple", "pear"), labelled("apple", "aple"))
    with pytest.raises(InputError, match=r"f:2: a label is a number, and in f:1 a string"):
        collect_labels(labelled("1", 2), [])


def test_what_is_hardly_a_class_is_said():
    many = collect_labels(labelled(*(f"free text {i}" for i in range(30))), [])
    assert "is this a column of numbers or free text?" in notice_labels(many, 30)[1]
    few = collect_labels(labelled(*("ab" * 30)), [])
    assert notice_labels(few, 60) == ["2 labels: a (30), b (30)"]
    points = collect_labels(labelled("0.5", "1.5"), [])
    assert "numbers with a point" in notice_labels(points, 60)[1]
    alike = collect_labels(labelled("Yes", "yes ", "no"), [])
    assert "differ in case or white space alone: 'Yes', 'yes '" in notice_labels(alike, 3)[1]


def test_every_label_keeps_a_row_to_learn_from_and_no_text_is_on_both_sides():
    samples = [
        LabelledSample((f"text {i // 2}",), ("rare" if i > 37 else "ab"[i % 2],), f"f:{i}")
        for i in range(40)
    ]
    for seed in range(20):
        train, held, [notice] = hold_out(samples, 0.3, seed)
        assert {x for s in train for x in s.labels} == {"a", "b", "rare"}
        assert not {s.texts for s in train} & {s.texts for s in held}
        assert len(train) + len(held) == 40
        assert len(held) == 12, "the share that was asked for"
        assert "12 of 40 rows held out" in notice
    with pytest.raises(InputError, match="none can be held out"):
        hold_out(labelled("a", "b"), 0.5, 1)


def test_a_words_tag_is_that_of_its_first_token():
    tokenizer = letter_tokenizer()
    sample = LabelledSample(("we", "x", "oslo"), ("O", "O", "B-LOC"), "f:1")
    row = tokenize_words(sample, tokenizer, 64, {"B-LOC": 0, "O": 1})
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids)
    assert tokens == ["[CLS]", "w", "##e", "x", "o", "##s", "##l", "##o", "[SEP]"]
    expected = [IGNORE, 1, IGNORE, 1, 0, IGNORE, IGNORE, IGNORE, IGNORE]
    assert row.labels == expected
    assert (row.supervised, row.words, row.truncated) == (3, (0, 1, 2), False)


def test_words_have_the_tokens_that_they_have_in_a_text():
    tokenizer = byte_tokenizer()
    sample = LabelledSample(("we", "x"), ("O", "B-X"), "f:1")
    row = tokenize_words(sample, tokenizer, 64, {"B-X": 0, "O": 1})
    assert tokenizer.decode(row.input_ids) == "we x"
    assert row.labels == [1, IGNORE, 0, IGNORE]


def test_cut_words_and_words_without_a_token_are_counted():
    tokenizer = letter_tokenizer()
    ids = {"O": 0, "B-X": 1}
    sample = LabelledSample(("a", " \t", "bc", "d"), ("O",) * 4, "f:1")
    row = tokenize_words(sample, tokenizer, 64, ids)
    assert (row.words, row.unseen) == ((0, 2, 3), 1)
    row = tokenize_words(sample, tokenizer, 5, ids)
    assert (row.words, row.truncated, len(row)) == ((0, 2), True, 5)


def test_a_pair_is_told_apart_and_padded_with_its_segments():
    tokenizer = letter_tokenizer()
    samples = [
        LabelledSample(("ab", "c"), ("x",), "f:1"),
        LabelledSample(("a" * 20, "b" * 4), ("y",), "f:2"),
    ]
    rows = [tokenize_sequence(s, tokenizer, 16, {"x": 0, "y": 1}) for s in samples]
    assert rows[0].segments == [0, 0, 0, 0, 1, 1]
    assert [row.truncated for row in rows] == [False, True]
    assert len(rows[1]) == 16
    assert rows[1].segments is not None
    assert sum(rows[1].segments) == 5, "the shorter text is whole, with its end"
    batch = LabelCollator(0, one_label=True)(rows)
    assert batch["labels"].tolist() == [[0], [1]]
    assert batch["token_type_ids"].shape == batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(1).tolist() == [6, 16]
