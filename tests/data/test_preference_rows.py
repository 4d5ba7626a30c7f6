"""Preference pairs and judged answers in all forms that TRL, LLaMA-Factory and ms-swift read."""

import re
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.formats import to_sample
from lorakit.data.preference_tokens import tokenize_judged, tokenize_pair, with_mismatched
from lorakit.data.sources import Row
from lorakit.errors import InputError
from tiny import byte_tokenizer


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def turn(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


def begin_of(row: Any) -> int:
    """Where the answer begins."""
    return next(i for i, label in enumerate(row.labels) if label >= 0)


PAIR, JUDGED = ("preference",), ("unpaired_preference",)
Q, GOOD, BAD = said("user", "Q"), said("assistant", "GOOD"), said("assistant", "BAD")
EARLIER = [said("user", "Q0"), said("assistant", "A0"), Q]
SYSTEM = said("system", "S")


def read(values: dict[str, Any], kinds: Any = PAIR, **columns: str) -> Any:
    return to_sample(Row(values, Path("rows.jsonl"), 3), columns, kinds)


def refused(values: dict[str, Any], kinds: Any = PAIR, **columns: str) -> str:
    with pytest.raises(InputError, match=r"^rows.jsonl:3: ") as caught:
        read(values, kinds, **columns)
    return str(caught.value)


ALIKE = [
    {"prompt": "Q", "chosen": "GOOD", "rejected": "BAD"},
    {"question": "Q", "chosen": "GOOD", "rejected": "BAD"},
    {"instruction": "Q", "input": "", "chosen": "GOOD", "rejected": "BAD", "history": []},
    {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [Q], "chosen": GOOD, "rejected": BAD},
    {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
    {"prompt": "Q", "messages": [Q, GOOD], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
    {"prompt": [Q], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
    {
        "conversations": [turn("human", "Q")],
        "chosen": turn("gpt", "GOOD"),
        "rejected": turn("gpt", "BAD"),
    },
    {"messages": [Q], "chosen": "GOOD", "rejected": "BAD"},
    {"chosen": "\n\nHuman: Q\n\nAssistant: GOOD", "rejected": "\n\nHuman: Q\n\nAssistant: BAD"},
    {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": "GOOD", "rejected": "BAD"},
    {"instruction": "Q", "output": ["GOOD", "BAD"]},
    {"messages": [Q, GOOD], "rejected_response": "BAD"},
    {"messages": [Q, GOOD], "rejected_response": [BAD]},
    {"messages": [Q, GOOD], "rejected_messages": [Q, BAD]},
    {"input": {"messages": [Q]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
]


@pytest.mark.parametrize("values", ALIKE)
def test_every_form_of_a_pair_is_the_same_pair(values: dict[str, Any]):
    sample = read(values)
    assert sample.messages == (Q, GOOD)
    assert sample.rejected.messages == (Q, BAD)
    assert sample.prompt == [Q]
    assert sample.reference == "GOOD"
    assert sample.prompt_key == read(ALIKE[0]).prompt_key


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": EARLIER, "chosen": "GOOD", "rejected": "BAD"},
        {"chosen": [*EARLIER, GOOD], "rejected": [*EARLIER, BAD]},
        {"prompt": "Q", "history": [["Q0", "A0"]], "chosen": "GOOD", "rejected": "BAD"},
        {
            "chosen": "\n\nHuman: Q0\n\nAssistant: A0\n\nHuman: Q\n\nAssistant: GOOD",
            "rejected": "\n\nHuman: Q0\n\nAssistant: A0\n\nHuman: Q\n\nAssistant: BAD",
        },
        {"messages": [*EARLIER, GOOD], "rejected_response": "BAD"},
        {"messages": [*EARLIER, GOOD], "rejected_response": [BAD]},
    ],
)
def test_of_several_turns_only_the_answers_that_differ_are_learned(
    values: dict[str, Any], tokenizer: Any
):
    sample = read(values)
    assert sample.prompt == EARLIER
    assert sample.learned == sample.rejected.learned == [3]
    row = tokenize_pair(sample, tokenizer, 500)
    texts = [tokenizer.decode([t for t in part.labels if t >= 0]) for part in row.parts]
    assert texts == ["GOOD<|im_end|>", "BAD<|im_end|>"]
    starts = [part.input_ids[: begin_of(part)] for part in row.parts]
    assert starts[0] == starts[1]


def test_system_messages_tools_and_marks_are_read_as_in_other_rows():
    tool = {"type": "function", "function": {"name": "f"}}
    sample = read({"system": "S", "tools": [tool], "prompt": "Q", "chosen": "G", "rejected": "B"})
    assert sample.messages[0] == sample.rejected.messages[0] == SYSTEM
    assert sample.tools == sample.rejected.tools == (tool,)
    given = {"messages": [Q], "tools": [tool]}
    openai = {"input": given, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
    assert read(openai).tools == (tool,)
    call = {**said("assistant", ""), "tool_calls": [{"name": "f", "arguments": {}}]}
    result, late = said("tool", "3"), said("assistant", "It is 3.")
    calls = read({"prompt": [Q], "chosen": [call, result, late], "rejected": [BAD]})
    assert calls.learned == [1, 3]
    assert calls.prompt == [Q]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "identical"),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "'rejected' is empty"),
        ({"prompt": "Q", "chosen": None, "rejected": "B"}, "'chosen' is null"),
        ({"prompt": "Q", "chosen": 7, "rejected": "B"}, "'chosen' is a number"),
        ({"prompt": "Q", "chosen": [], "rejected": "B"}, "'chosen' is empty"),
        ({"prompt": " ", "chosen": "A", "rejected": "B"}, "'prompt' is empty"),
        ({"prompt": 3, "chosen": "A", "rejected": "B"}, "'prompt' is a number"),
        ({"chosen": "A", "rejected": "B"}, "there is no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "nothing comes before the answers"),
        ({"prompt": [GOOD], "chosen": "A", "rejected": "B"}, "nothing comes before"),
        ({"prompt": [Q, GOOD], "chosen": "A", "rejected": "B"}, "ends with an assistant"),
        ({"chosen": [Q, GOOD], "rejected": [said("user", "R"), BAD]}, "prompts differ"),
        ({"chosen": [Q, GOOD, Q], "rejected": [Q, BAD, Q]}, "last turn of 'chosen' is a user"),
        ({"chosen": [Q, GOOD], "rejected": [Q]}, "'rejected' has no answer"),
        ({"chosen": [Q, GOOD], "rejected": "B"}, "whole conversation"),
        ({"prompt": "Z", "chosen": [Q, GOOD], "rejected": [Q, BAD]}, "'prompt' differs"),
        ({"prompt": "Q", "messages": [Q], "chosen": "A", "rejected": "B"}, "remove all but one"),
        ({"prompt": "Q", "chosen": {"answer": "A"}, "rejected": {"answer": "B"}}, "it has answer"),
        ({"instruction": "Q", "output": ["A", "B", "C"]}, "list of two answers"),
        ({"instruction": "Q", "output": "A"}, "list of two answers"),
        ({"messages": [Q, GOOD], "rejected_response": ["B", "C"]}, "a row for each pair"),
        ({"prompt": "Q", "chosen": "[{'role': 'user'}]", "rejected": "B"}, "written as text"),
        ({"messages": [Q, GOOD], "rejected_response": ""}, "'rejected_response' is empty"),
        ({"input": [Q], "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "'input'"),
        ({"prompt": "Q", "completion": "A"}, r"chosen\+rejected"),
        ({"prompt": "Q", "completion": "A", "label": True}, "objective: kto"),
        ({"question": "Q", "pos_answer": "A", "neg_answer": "B"}, "chosen: pos_answer"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named_with_its_place(values: dict[str, Any], named: str):
    assert re.search(named, refused(values))


def test_columns_of_other_names_are_mapped():
    values = {"q": "Q", "pos": "GOOD", "neg": "BAD"}
    assert read(values, prompt="q", chosen="pos", rejected="neg").messages == (Q, GOOD)


@pytest.mark.parametrize("value", [True, 1, "true", "True", "1", False, 0, "false", "0"])
@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"prompt": "Q", "completion": "A"}, "label"),
        ({"prompt": [Q], "completion": [said("assistant", "A")]}, "label"),
        ({"messages": [Q, said("assistant", "A")]}, "label"),
        ({"conversations": [turn("human", "Q"), turn("gpt", "A")]}, "kto_tag"),
        ({"instruction": "Q", "input": "", "output": "A"}, "kto_tag"),
    ],
)
def test_judged_answers_are_read_with_every_form_of_label(
    values: dict[str, Any], name: str, value: Any
):
    sample = read({**values, name: value}, JUDGED)
    assert sample.desirable == (value in (True, "true", "True", "1"))
    assert sample.messages == (Q, said("assistant", "A"))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"prompt": "Q", "completion": "A", "label": "good"}, "'label' is 'good'"),
        ({"prompt": "Q", "completion": "A", "label": None}, "'label' is null"),
        ({"prompt": "Q", "completion": "A", "label": 0.5}, "'label' is 0.5"),
        ({"prompt": "Q", "completion": " ", "label": True}, "the answer is empty"),
        ({"messages": [Q, GOOD, Q], "label": True}, "the last turn is a user"),
        ({"prompt": "Q", "completion": "A"}, r"prompt\+completion\+label"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "objective: dpo"),
    ],
)
def test_a_judged_answer_that_cannot_be_used_is_named(values: dict[str, Any], named: str):
    assert re.search(named, refused(values, JUDGED))


def test_of_a_judged_conversation_the_last_answer_is_learned():
    sample = read({"messages": [*EARLIER, GOOD], "label": False}, JUDGED)
    assert sample.learned == [3]
    assert sample.prompt == EARLIER


def test_pairs_of_which_nothing_is_left_behind_the_cut_have_nothing_to_learn(tokenizer: Any):
    values = {"prompt": "Q", "chosen": "same, then A", "rejected": "same, then B"}
    row = tokenize_pair(read(values), tokenizer, 500)
    differ = next(
        i for i, (a, b) in enumerate(zip(*(p.input_ids for p in row.parts), strict=False)) if a != b
    )
    assert tokenize_pair(read(values), tokenizer, differ).supervised == 0
    assert tokenize_pair(read(values), tokenizer, differ + 1).supervised > 0
    begin = begin_of(row.parts[0])
    assert tokenize_pair(read(values), tokenizer, begin).supervised == 0
    assert row.longest == max(map(len, row.parts))


def test_answers_that_the_template_writes_alike_are_refused(tokenizer: Any):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", "(m['content'] | trim)"
    )
    with pytest.raises(InputError, match=r"rows.jsonl:3: .*the same tokens"):
        tokenize_pair(read({"prompt": "Q", "chosen": "A", "rejected": "A "}), tokenizer, 500)


def test_a_mismatched_answer_is_that_of_the_row_before_with_another_prompt(tokenizer: Any):
    def judged(prompt: str, answer: str) -> Any:
        values = {"prompt": prompt, "completion": answer, "label": True}
        return tokenize_judged(read(values, JUDGED), tokenizer, 500)

    given = [("p", "one"), ("p", "two"), ("r", "three"), ("s", "four")]
    rows = with_mismatched([judged(*one) for one in given], 500)
    for row, other in zip(rows, ("four", "four", "two", "three"), strict=True):
        mismatched = row.mismatched  # type: ignore[attr-defined]
        prompt = row.input_ids[: begin_of(row)]
        assert mismatched.input_ids[: len(prompt)] == prompt
        learned = [token for token in mismatched.labels if token >= 0]
        assert tokenizer.decode(learned) == f"{other}<|im_end|>"
