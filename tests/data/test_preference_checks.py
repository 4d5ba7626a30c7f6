"""What is found in preference pairs and judged answers before they are learned from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.dataset import PreparedData, prepare
from lorakit.data.findings import Finding
from lorakit.data.preference_tokens import tokenize_judged, tokenize_pair
from lorakit.objectives.registry import make_objective
from tiny import byte_tokenizer

WriteRows = Callable[..., Path]


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def judged(prompt: str, answer: str, label: bool) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer, "label": label}


def pairs(path: Path, **options: Any) -> PreparedData:
    return prepare(byte_tokenizer(), path, 0, kinds=["preference"], to_row=tokenize_pair, **options)


def judgements(path: Path) -> PreparedData:
    kinds = ["unpaired_preference", "preference"]
    return prepare(byte_tokenizer(), path, 0, kinds=kinds, to_row=tokenize_judged)


def found(data: PreparedData, part: str) -> Finding:
    """The one finding with `part` in what it says."""
    [finding] = [finding for finding in data.findings if part in finding.what]
    return finding


def test_pairs_without_fault_have_no_findings(write_rows: WriteRows) -> None:
    rows = [pair(f"Q{n}", "good" + "!" * (n % 3), "bad.." + "." * (n % 2)) for n in range(30)]
    assert [finding.what for finding in pairs(write_rows(rows)).findings if finding.count] == []


def test_pairs_whose_order_another_row_reverses_are_both_counted(write_rows: WriteRows) -> None:
    rows = [pair("Q", "a", "b"), pair("Q", "b", "a"), pair("Q", "a", "c"), pair("P", "b", "a")]
    finding = found(pairs(write_rows(rows)), "contradicted")
    assert (finding.count, finding.first) == (2, ("rows.jsonl:1", "rows.jsonl:2"))


def test_an_answer_that_is_judged_in_both_ways_is_counted(write_rows: WriteRows) -> None:
    rows = [judged("Q", "a", True), judged("Q", "a", False), judged("Q", "b", False)]
    finding = found(judgements(write_rows(rows)), "contradicted")
    assert (finding.count, finding.first) == (2, ("rows.jsonl:1", "rows.jsonl:2"))


def test_answers_that_differ_in_white_space_or_case_alone_are_counted(
    write_rows: WriteRows,
) -> None:
    rows = [pair("Q", "An answer.", "an\n answer. "), pair("Q", "one", "two")]
    finding = found(pairs(write_rows(rows)), "white space")
    assert (finding.count, finding.first) == (1, ("rows.jsonl:1",))


def test_conversations_that_go_on_with_different_questions_are_counted(
    write_rows: WriteRows,
) -> None:
    def talk(*said: str) -> list[dict[str, str]]:
        roles = ("user", "assistant", "user", "assistant")
        return [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]

    rows = [
        {"chosen": talk("Q", "a", "More?", "b"), "rejected": talk("Q", "c", "Less?", "d")},
        {"chosen": talk("Q", "a", "More?", "b"), "rejected": talk("Q", "c", "More?", "d")},
        {"chosen": talk("Q", "a", "More?", "b"), "rejected": talk("Q", "a", "More?", "d")},
    ]
    finding = found(pairs(write_rows(rows)), "different things")
    assert (finding.count, finding.first) == (1, ("rows.jsonl:1",))


def test_pairs_that_are_cut_to_the_same_tokens_are_counted_with_the_length_that_keeps_them(
    write_rows: WriteRows,
) -> None:
    """OpenRLHF 1311: such pairs cost ln 2, have no gradient and were learned all the same."""
    rows = [pair("Q", "same " * 20 + "good", "same " * 20 + "bad"), pair("Q", "yes", "no")]
    data = pairs(write_rows(rows), max_length=80)
    finding = found(data, "both answers are the same")
    assert (finding.count, finding.of, finding.first) == (1, 2, ("rows.jsonl:1",))
    assert len(data.train) == 1
    length = int(finding.cure.rpartition("=")[2].split()[0])
    assert found(pairs(write_rows(rows), max_length=length), "both answers").count == 0


@pytest.mark.parametrize(("chosen", "rejected", "word"), [(30, 10, "longer"), (10, 30, "shorter")])
def test_a_length_bias_of_pairs_is_found_with_the_medians(
    write_rows: WriteRows, chosen: int, rejected: int, word: str
) -> None:
    rows = [pair(f"Q{n}", "a" * chosen, "b" * rejected) for n in range(15)]
    rows += [pair(f"Q{n}", "a" * rejected, "b" * chosen) for n in range(15, 20)]
    data = pairs(write_rows(rows))
    finding = found(data, "length bias")
    assert (finding.count, finding.of) == (15, 20)
    assert word in finding.what
    figures = data.statistics()["train"].preferences
    assert figures is not None
    assert figures.chosen_longer == (0.75 if chosen > rejected else 0.25)
    assert (figures.chosen_tokens, figures.rejected_tokens) == (chosen + 1, rejected + 1)  # the end


def test_a_few_pairs_or_lengths_on_both_sides_are_no_bias(write_rows: WriteRows) -> None:
    few = [pair(f"Q{n}", "long answer", "no") for n in range(19)]
    even = [pair(f"Q{n}", "aaa" if n % 2 else "a", "bb") for n in range(40)]
    for rows in (few, even):
        assert not [f for f in pairs(write_rows(rows)).findings if "length bias" in f.what]


def test_a_length_bias_of_judged_answers_is_that_desirable_ones_are_longer(
    write_rows: WriteRows,
) -> None:
    rows = [judged(f"Q{n}", "a" * (20 if n % 2 else 5), bool(n % 2)) for n in range(60)]
    data = judgements(write_rows(rows))
    assert found(data, "length bias").count == 30
    figures = data.statistics()["train"].preferences
    assert figures is not None
    assert (figures.chosen, figures.rejected, figures.chosen_longer) == (30, 30, 1.0)


def test_the_cut_end_of_a_chosen_answer_is_not_an_answer_without_end_token(
    write_rows: WriteRows,
) -> None:
    data = pairs(write_rows([pair("Q", "a" * 200, "b")]), max_length=64)
    assert [f.what for f in data.findings if "end token" in f.what and f.count] == []
    assert data.statistics()["train"].lengths["max"] == 64


@pytest.mark.parametrize(("good", "bad"), [(33, 100), (3, 7), (100, 31), (9, 4)])
def test_the_weight_that_is_proposed_for_uneven_judgements_is_within_the_papers_bounds(
    write_rows: WriteRows, good: int, bad: int
) -> None:
    rows = [judged(f"Q{n}", f"a{n}", n < good) for n in range(good + bad)]
    learned = judgements(write_rows(rows)).train
    [notice] = make_objective("kto").notices(learned)
    name, value = notice.rpartition("objective.")[2].split("=")
    assert make_objective({"type": "kto", name: float(value)}).notices(learned) == []


def test_judgements_of_one_kind_are_said(write_rows: WriteRows) -> None:
    rows = [judged(f"Q{n}", f"a{n}", True) for n in range(5)]
    [notice] = make_objective("kto").notices(judgements(write_rows(rows)).train)
    assert "all 5 answers are desirable" in notice
