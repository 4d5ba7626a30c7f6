"""Scores of labels against their definitions, however rows were divided into batches."""

import random

import pytest
import torch

from lorakit.data.masking import IGNORE
from lorakit.data.scores import LabelScorer, entity_spans


def test_accuracy_and_macro_f1_are_those_of_their_definitions():
    draw = random.Random(0)
    actual = [draw.randrange(4) for _ in range(200)]
    found = [a if draw.random() < 0.6 else draw.randrange(4) for a in actual]
    scorer = LabelScorer(("a", "b", "c", "d", "never"))
    pairs = list(zip(actual, found, strict=True))
    wanted = []
    for c in range(4):
        right = sum(a == f == c for a, f in pairs)
        precision = right / found.count(c)
        recall = right / actual.count(c)
        wanted.append(2 * precision * recall / (precision + recall))
    counts = scorer.count(torch.tensor(found)[:, None], torch.tensor(actual)[:, None])
    scores = scorer.scores(counts)
    assert scores["accuracy"] == pytest.approx(sum(a == f for a, f in pairs) / 200)
    assert scores["f1"] == pytest.approx(sum(wanted) / 4), "a class that never occurs is left out"
    assert scorer.by_class(counts)[4] is None
    assert set(scores) == {"accuracy", "f1"}


def test_counts_of_parts_add_up_to_the_counts_of_the_whole():
    torch.manual_seed(0)
    scorer = LabelScorer(("B-X", "I-X", "O"), words=True)
    actual, found = torch.randint(0, 3, (12, 9)), torch.randint(0, 3, (12, 9))
    actual[torch.rand(12, 9) < 0.2] = IGNORE
    parts = [scorer.count(found[i : i + 5], actual[i : i + 5]) for i in (0, 5, 10)]
    assert torch.equal(torch.stack(parts).sum(0), scorer.count(found, actual))


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", set()),
        ("B-X", {(0, 1, "X")}),
        ("B-X I-X O B-Y", {(0, 2, "X"), (3, 4, "Y")}),
        ("B-X B-X I-X", {(0, 1, "X"), (1, 3, "X")}),
        ("O I-X I-X", {(1, 3, "X")}),
        ("B-X I-Y", {(0, 1, "X"), (1, 2, "Y")}),
        ("I-A-B I-A-B", {(0, 2, "A-B")}),
    ],
)
def test_entities_begin_where_their_tags_say(tags: str, spans: set[tuple[int, int, str]]):
    assert entity_spans(tags.split()) == spans


def test_an_entity_counts_only_when_whole_and_of_the_right_kind():
    names = ("B-X", "I-X", "B-Y", "I-Y", "O")
    scorer = LabelScorer(names, words=True)

    def row(tags: str) -> list[int]:
        return [IGNORE if tag == "-" else names.index(tag) for tag in tags.split()]

    actual = torch.tensor([row("B-X - I-X O B-Y"), row("O B-X O B-Y I-Y")])
    found = torch.tensor([row("B-X O I-X O B-X"), row("O B-X O B-Y O")])
    scores = scorer.scores(scorer.count(found, actual))
    # Of 4 entities and 4 predicted ones, 2 are the same: (X 0-1) and (X 1).
    assert scores["entity_f1"] == pytest.approx(0.5)
    assert scores["accuracy"] == pytest.approx(7 / 9)


def test_tags_that_are_not_bio_have_no_entities():
    assert not LabelScorer(("NOUN", "O"), words=True).entities
    assert not LabelScorer(("O",), words=True).entities
    assert not LabelScorer(("B-X", "O"), words=False).entities
