import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.formats import to_sample
from lorakit.data.mixing import mix
from lorakit.data.sources import Row
from lorakit.errors import InputError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def row(**values: Any) -> Row:
    return Row(values, Path("folder/orders.jsonl"), 12)


def contents(sample_row: Row, **columns: str) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in to_sample(sample_row, columns).messages]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [USER, ANSWER]},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a", "system": "", "history": []},
        {"instruction": "q", "input": None, "output": "a", "system": None, "history": None},
        {"instruction": "", "input": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "q", "response": "a", "id": 7},
        {"question": "q", "answer": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
    ],
)
def test_every_format_gives_the_same_conversation(values: dict[str, Any]) -> None:
    sample = to_sample(row(**values))
    assert sample.messages == (USER, ANSWER)
    assert sample.text is None
    assert sample.where == "orders.jsonl:12"
    assert sample.prompt == [USER]
    assert sample.reference == "a"


def test_plain_text_is_its_own_prompt_key() -> None:
    sample = to_sample(row(text="once upon a time"))
    assert (sample.text, sample.messages, sample.prompt) == ("once upon a time", (), [])
    assert (sample.prompt_key, sample.reference) == ("once upon a time", "")


def test_alpaca_joins_instruction_and_input_and_puts_history_before() -> None:
    values = {"instruction": "i", "input": "x", "output": "o", "system": "s"}
    assert contents(row(**values, history=[["q1", "a1"], ["q2", "a2"]])) == [
        ("system", "s"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "i\nx"),
        ("assistant", "o"),
    ]


def test_the_prompt_ends_before_the_last_answer() -> None:
    sample = to_sample(row(messages=[USER, ANSWER, USER, {**ANSWER, "content": "b"}, USER]))
    assert sample.prompt == [USER, ANSWER, USER]
    assert sample.reference == "b"


def test_prompt_keys_are_equal_exactly_when_the_prompts_are() -> None:
    one = to_sample(row(prompt="q", completion="a")).prompt_key
    same = to_sample(row(instruction="q", output="another")).prompt_key
    other = to_sample(row(prompt="q", completion="a", system="s")).prompt_key
    assert one == same != other


def test_further_keys_of_a_message_are_kept_unless_null() -> None:
    asked = {**USER, "name": "Eve", "tool_calls": None}
    assert to_sample(row(messages=[asked, ANSWER])).messages[0] == {**USER, "name": "Eve"}


def test_columns_are_renamed_by_the_mapping() -> None:
    meaning = row(mr="q", ref="a")
    expected = [("user", "q"), ("assistant", "a")]
    assert contents(meaning, prompt="mr", completion="ref") == expected
    # The file's 'input' is the output here, so it is not an alpaca input as well.
    swapped = row(instruction="q", input="a")
    assert contents(swapped, output="input") == expected


def test_the_mapping_settles_which_of_two_formats_is_meant() -> None:
    both = row(instruction="q", output="a", text="### q ### a")
    with pytest.raises(InputError, match=r"fit instruction\+output and text; .*data.columns"):
        to_sample(both)
    assert contents(both, instruction="instruction") == [("user", "q"), ("assistant", "a")]
    assert to_sample(both, {"text": "text"}).text == "### q ### a"


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["(none) fit no format"]),
    ({"mr": "q", "ref": "a"}, ["(mr, ref)", "prompt+completion", "{prompt: mr, completion: ref}"]),
    ({"body": "q"}, ["data.columns: {text: body}"]),
    ({"messages": None}, ["'messages' is null", "expected a list"]),
    ({"messages": "hi"}, ["'messages' is a string", "expected a list"]),
    ({"messages": []}, ["no assistant message"]),
    ({"messages": [USER]}, ["no assistant message"]),
    ({"messages": [ANSWER]}, ["nothing comes before the answer"]),
    ({"messages": ["hi"]}, ["messages[0] is a string", "expected an object"]),
    ({"messages": [{"from": "human", "value": "q"}]}, ["no 'role'", "from, value"]),
    ({"messages": [{"role": "user"}]}, ["messages[0] has no 'content'"]),
    ({"messages": [USER, {**ANSWER, "content": None}]}, ["messages[1].content is null"]),
    (
        {"messages": [{**USER, "content": [{"type": "text"}]}]},
        ["content[0].text is null", "expected a string"],
    ),
    ({"messages": [{**USER, "role": "asistant"}]}, ["'asistant'", "did you mean 'assistant'"]),
    ({"messages": [{**USER, "role": 1}]}, ["messages[0].role is a number"]),
    ({"messages": [{**USER, "content": " "}, ANSWER]}, ["a user message is empty"]),
    ({"messages": [{**USER, "role": "system"}, ANSWER], "system": "s"}, ["'system' column"]),
    ({"instruction": "q", "output": True}, ["'output' is true or false"]),
    ({"instruction": "", "input": "", "output": "a"}, ["a user message is empty"]),
    ({"instruction": "q", "input": 3, "output": "a"}, ["'input' is a number"]),
    ({"instruction": "q", "output": "a", "history": [["x"]]}, ["history[0] must be a pair"]),
    ({"instruction": "q", "output": "a", "history": [["x", 1]]}, ["history[0] is a number"]),
    ({"prompt": "q", "completion": [ANSWER]}, ["'prompt' is a string", "two lists"]),
    ({"prompt": "q", "completion": None}, ["'completion' is null", "expected a string"]),
    ({"prompt": "q", "completion": "a", "response": "b"}, ["fit prompt+completion and"]),
    ({"prompt": "half \ud83d", "completion": "a"}, ["'prompt'", "surrogate"]),
    ({"conversations": [{"from": "bot", "value": "a"}]}, ["unknown role 'bot'", "human"]),
    ({"text": ""}, ["'text' is empty"]),
    ({"text": ["a"]}, ["'text' is a list"]),
]


@pytest.mark.parametrize(("values", "expected"), REFUSED)
def test_a_row_that_cannot_be_used_is_refused_with_its_place(
    values: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        to_sample(row(**values))
    assert str(caught.value).startswith("orders.jsonl:12: ")
    assert [word for word in expected if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"promt": "mr"}, "'promt' is not a column of any format (did you mean 'prompt'?)"),
        ({"prompt": "mr", "output": "ref"}, "no format has all of prompt, output"),
        ({"prompt": "mrs", "completion": "ref"}, "no column 'mrs'"),
        ({"prompt": "mrs", "completion": "ref"}, "did you mean 'mr'"),
        ({"prompt": "mr"}, "fit no format"),
    ],
)
def test_a_mapping_that_cannot_be_used_is_refused(columns: dict[str, str], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        to_sample(row(mr="q", ref="a"), columns)
    assert expected in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value"]) | st.text(), inner, max_size=3
        )
    ),
    max_leaves=8,
)
COLUMNS = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text"]
)


@given(st.dictionaries(COLUMNS | st.text(max_size=3), JSON, max_size=4))
def test_any_row_gives_a_sample_or_one_clear_line(values: dict[str, Any]) -> None:
    sample, refusal = None, ""
    try:
        sample = to_sample(row(**values))
    except InputError as error:
        refusal = str(error)
    if sample is None:
        assert refusal.startswith("orders.jsonl:12: ")
    else:
        assert (sample.text is None) == bool(sample.messages)
        assert isinstance(sample.prompt_key, str)


HISTORY = [["q1", "a1"], ["q2", "a2"]]
EARLIER = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("instruction", "output"),
        ("prompt", "completion"),
        ("prompt", "response"),
        ("question", "answer"),
    ],
)
@pytest.mark.parametrize(
    "history",
    [
        HISTORY,
        json.dumps(HISTORY),
        [{"role": role, "content": content} for role, content in EARLIER],
    ],
)
def test_earlier_turns_stand_before_a_question(question: str, answer: str, history: Any) -> None:
    values = {question: "q3", answer: "a3", "history": history, "system": "s"}
    sample = to_sample(row(**values))
    assert [(m["role"], m["content"]) for m in sample.messages] == [
        ("system", "s"),
        *EARLIER,
        ("user", "q3"),
        ("assistant", "a3"),
    ]
    for none in (None, [], "", "[]"):
        assert len(to_sample(row(**{**values, "history": none})).messages) == 3


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_two_system_messages_are_blamed_on_where_they_stand(column: str) -> None:
    system = {"role": "system", "content": "s"}
    with pytest.raises(InputError, match=rf"two system messages at the beginning of '{column}'"):
        to_sample(row(**{column: [system, system, USER, ANSWER]}))
    with pytest.raises(InputError, match=r"'system' column and in the messages"):
        to_sample(row(**{column: [system, USER, ANSWER]}, system="s"))


def test_line_ends_of_windows_are_read_as_line_breaks_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one\r\ntwo", "completion": "a\r\nb\r\n"},
        {"prompt": "q", "completion": "a\rb\n"},
        {"messages": [{**USER, "content": "x\r\ny"}, ANSWER]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    mixture = mix(str(path))
    assert [[m["content"] for m in sample.messages] for sample in mixture.samples] == [
        ["one\ntwo", "a\nb\n"],
        ["q", "a\rb\n"],
        ["x\ny", "a"],
    ]
    (notice,) = (line for line in mixture.notices if "line ends" in line)
    assert "2 rows (first: rows.jsonl:1)" in notice
