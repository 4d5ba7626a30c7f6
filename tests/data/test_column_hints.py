"""What is proposed for columns that fit no format, for rows as public data sets have them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.data.column_hints import as_yaml
from lorakit.data.formats import proposed, to_sample
from lorakit.data.mixing import mix
from lorakit.data.sources import Row
from lorakit.errors import InputError


def pair(question: str, answer: str, **more: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer, **more}


KNOWN: dict[str, tuple[list[str], dict[str, str]]] = {
    "Dolly": (
        ["instruction", "context", "response", "category"],
        {"instruction": "instruction", "input": "context", "output": "response"},
    ),
    "Firefly": (["kind", "input", "target"], pair("input", "target")),
    "OpenOrca": (
        ["id", "system_prompt", "question", "response"],
        pair("question", "response", system="system_prompt"),
    ),
    "MetaMath": (["query", "response", "type", "original_question"], pair("query", "response")),
    "XSum": (["document", "summary", "id"], pair("document", "summary")),
    "CNN/DailyMail": (["article", "highlights", "id"], pair("article", "highlights")),
    "SAMSum": (["id", "dialogue", "summary"], pair("dialogue", "summary")),
    "E2E": (["mr", "ref"], pair("mr", "ref")),
    "E2E of the hub": (
        ["gem_id", "meaning_representation", "target"],
        pair("meaning_representation", "target"),
    ),
    "Aya": (["inputs", "targets", "language"], pair("inputs", "targets")),
    "NuminaMath": (["source", "problem", "solution"], pair("problem", "solution")),
    "medical-o1": (["Question", "Complex_CoT", "Response"], pair("Question", "Response")),
    "Chinese medical dialogue": (["department", "title", "ask", "answer"], pair("ask", "answer")),
    "ms-swift": (["query", "response"], pair("query", "response")),
    "GPTeacher": (
        ["instruction", "input", "response"],
        {"instruction": "instruction", "input": "input", "output": "response"},
    ),
    "问答": (["问题", "回答"], pair("问题", "回答")),
    "指令": (
        ["指令", "输入", "输出"],
        {"instruction": "指令", "input": "输入", "output": "输出"},
    ),
    "上下文": (
        ["编号", "上下文", "问题", "答案"],
        {"instruction": "问题", "input": "上下文", "output": "答案"},
    ),
    "翻译": (["原文", "译文"], pair("原文", "译文")),
    "in another order": (["Answer", "Question"], pair("Question", "Answer")),
    "with blanks": (["User Prompt", " Answer "], pair("User Prompt", " Answer ")),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_hint_names_columns_by_their_meaning_and_works(name: str) -> None:
    own, expected = KNOWN[name]
    row = Row({column: f"text of {column}" for column in own}, Path("rows.jsonl"), 1)
    assert proposed(row.values) == expected
    with pytest.raises(InputError) as caught:
        to_sample(row)
    hint = str(caught.value).partition("data.columns: ")[2].partition(" (lorakit")[0]
    assert yaml.safe_load(hint) == expected
    sample = to_sample(row, yaml.safe_load(hint))
    asked, *_, answer = list(expected.values())[: 3 if "output" in expected else 2]
    assert sample.reference == f"text of {answer}"
    assert f"text of {asked}" in sample.messages[-2]["content"]


@pytest.mark.parametrize(
    "values",
    [
        {"a": "x", "b": "y"},
        {"id": "1", "title": "t", "context": "c", "answers": {"text": ["a"]}},  # SQuAD
        {"query": "q", "answer": "a", "response": "r"},
        {"question": "q", "problem": "p", "solution": "s"},
        {"questions": [["q"]], "answers": ["a"]},  # Huatuo
        {"标题": "t", "内容": "c"},
        {"conversation": [{"human": "q", "assistant": "a"}]},  # Firefly's talks
        {"id": "1", "data": ["q", "a"]},  # UltraChat, as published first
        {"number": 1, "output": 2},
    ],
)
def test_nothing_is_guessed_where_the_meaning_is_not_clear(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="fit no format") as caught:
        to_sample(Row(values, Path("rows.jsonl"), 1))
    columns = str(caught.value).partition("data.columns: ")[2]
    if len(values) > 1:
        assert columns.startswith("{prompt: YOUR_QUESTIONS, completion: YOUR_ANSWERS}")


def test_conversations_under_another_name_are_known() -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert proposed({"id": 1, "conversation": talk, "system_prompt": "s"}) == {
        "messages": "conversation",
        "system": "system_prompt",
    }
    assert proposed({"dialog": [{"from": "human", "value": "q"}]}) == {"conversations": "dialog"}


def test_a_text_beside_an_answer_is_asked_about() -> None:
    row = Row({"text": "long", "summary": "short", "title": "t"}, Path("bills.jsonl"), 1)
    with pytest.raises(
        InputError, match=r"'text' and 'summary'.*prompt: text, completion: summary"
    ):
        to_sample(row)
    assert to_sample(row, {"text": "text"}).text == "long"
    assert to_sample(row, {"prompt": "text", "completion": "summary"}).reference == "short"


@pytest.mark.parametrize(
    "name", ["yes", "a: b", " blank", "1", "{x}", "a#b", "'", '"', "問 題", ""]
)
def test_any_name_is_quoted_as_yaml_needs_it(name: str) -> None:
    assert yaml.safe_load(as_yaml({"prompt": name})) == {"prompt": name}


@pytest.mark.parametrize(
    ("values", "name", "word"),
    [
        ({"question": "q", "answer": "a", "context": "c"}, "context", "input: context"),
        ({"prompt": "p", "completion": "a", "system_prompt": "s"}, "system_prompt", "system:"),
        ({"prompt": "p", "completion": "a", "functions": "[]"}, "functions", "tools: functions"),
        ({"prompt": "p", "completion": "a", "weight": 0}, "weight", "data.train"),
        ({"prompt": "p", "completion": "a", "loss": False}, "loss", "data.train"),
        ({"text": "t", "label": 1}, "label", "SEQ_CLS"),
        ({"text": "t", "system": "s"}, "system", "messages"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
            | {"history": [["q", "a"]]},
            "history",
            "messages",
        ),
    ],
)
def test_unread_columns_that_may_matter_are_named_with_a_cure(
    write_rows: Any, values: dict[str, Any], name: str, word: str
) -> None:
    path = write_rows([values, values, {**values, name: None}, {**values, "id": 7}])
    notices = mix(str(path)).notices
    (notice,) = [line for line in notices if f"'{name}' is not read" in line]
    assert "3 rows (first: rows.jsonl:1)" in notice
    assert word in notice
    assert any("2 columns not read" in line for line in notices)


@pytest.mark.parametrize(
    ("values", "kinds", "expected"),
    [
        (
            {"question": "q", "pos_answer": "a", "neg_answer": "b"},
            "preference",
            {"prompt": "question", "chosen": "pos_answer", "rejected": "neg_answer"},
        ),
        (
            {"prompt": "q", "response_accepted": "a", "response_rejected": "b"},
            "preference",
            {"prompt": "prompt", "chosen": "response_accepted", "rejected": "response_rejected"},
        ),
        (
            {"query": "q", "response": "a", "rejected_response": "b"},
            "preference",
            {"prompt": "query", "chosen": "response", "rejected": "rejected_response"},
        ),
        (
            {"query": "q", "response": "a", "thumbs_up": True},
            "unpaired_preference",
            {"prompt": "query", "completion": "response", "label": "thumbs_up"},
        ),
        ({"id": 1, "article": "long"}, "document", {"document": "article"}),
        ({"title": "t", "content": "long"}, "document", {"document": "content"}),
    ],
)
def test_columns_of_other_objectives_are_proposed_and_work(
    values: dict[str, Any], kinds: str, expected: dict[str, str]
) -> None:
    row = Row(values, Path("rows.jsonl"), 1)
    with pytest.raises(InputError, match="fit no format") as caught:
        to_sample(row, kinds=[kinds])
    hint = str(caught.value).partition("data.columns: ")[2].partition(" (lorakit")[0]
    assert yaml.safe_load(hint) == expected
    assert to_sample(row, expected, [kinds]).where == row.where


def test_columns_whose_values_cannot_be_read_are_not_proposed() -> None:
    judged = {name: {"answer": name, "score": 1.0} for name in ("pos_answer", "neg_answer")}
    with pytest.raises(InputError, match="chosen: YOUR_CHOSEN"):
        to_sample(Row({"question": "q", **judged}, Path("rows.jsonl"), 1), kinds=["preference"])


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"query": "q", "response": "a", "rejected_response": "b"},
    ],
)
def test_how_the_chosen_answers_alone_are_learned_is_proposed_and_works(
    values: dict[str, Any],
) -> None:
    row = Row(values, Path("rows.jsonl"), 1)
    with pytest.raises(InputError, match="is a preference pair") as caught:
        to_sample(row)
    hint = str(caught.value).partition("data.columns: ")[2]
    assert to_sample(row, yaml.safe_load(hint)).reference == "a"
