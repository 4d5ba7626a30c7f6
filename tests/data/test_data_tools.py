"""Tools and their calls, however a data set has them, come out in one form."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.formats import to_sample
from lorakit.data.samples import Sample
from lorakit.data.sources import Row

ARGUMENTS = {"city": "Cork", "days": 2}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "Rain in Cork?"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"rain": true}'}
ANSWER = {"role": "assistant", "content": "Yes."}


def sample(**values: Any) -> Sample:
    return to_sample(Row(values, Path("calls.jsonl"), 1))


def calling(**message: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", **message}, RESULT, ANSWER]


@pytest.mark.parametrize(
    "messages",
    [
        calling(content="", tool_calls=[CALL]),
        calling(content=None, tool_calls=[CALL], function_call=None),
        calling(tool_calls=[CALL]),
        calling(tool_calls=[{"function": {"name": "weather", "arguments": ARGUMENTS}}]),
        calling(tool_calls=[{"name": "weather", "arguments": json.dumps(ARGUMENTS)}]),
        calling(
            tool_calls=[
                {**CALL, "function": {**CALL["function"], "arguments": json.dumps(ARGUMENTS)}}
            ]
        ),
        calling(tool_calls=json.dumps([CALL])),
        calling(
            content=None, function_call={"name": "weather", "arguments": json.dumps(ARGUMENTS)}
        ),
        [USER, CALLING, {**RESULT, "role": "function"}, ANSWER],
    ],
)
def test_calls_in_messages_come_out_in_one_form(messages: list[dict[str, Any]]) -> None:
    assert sample(messages=messages).messages == (USER, CALLING, RESULT, ANSWER)


@pytest.mark.parametrize("role", ["from", "role"])
@pytest.mark.parametrize("called", ["function_call", "tool_call"])
@pytest.mark.parametrize("result", ["observation", "tool", "function_response"])
@pytest.mark.parametrize("many", [False, True])
def test_calls_in_sharegpt_come_out_in_the_same_form(
    role: str, called: str, result: str, many: bool
) -> None:
    call = {"name": "weather", "arguments": ARGUMENTS}
    turns = [
        ("human", USER["content"]),
        (called, json.dumps([call] if many else call)),
        (result, RESULT["content"]),
        ("gpt", ANSWER["content"]),
    ]
    content = "value" if role == "from" else "content"
    conversations = [{role: name, content: value} for name, value in turns]
    found = sample(conversations=conversations, tools=json.dumps([TOOL["function"]]))
    assert found.messages == (USER, CALLING, RESULT, ANSWER)
    assert found.tools == (TOOL,)


@pytest.mark.parametrize("role", ["gpt", "assistant", "model", "chatgpt", "bing", "bard"])
def test_the_names_that_an_assistant_has_in_the_wild_are_known(role: str) -> None:
    found = sample(conversations=[{"from": "human", "value": "q"}, {"from": role, "value": "a"}])
    assert found.messages[1] == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [TOOL["function"]],
        json.dumps([TOOL]),
        json.dumps([TOOL["function"]]),
        [json.dumps(TOOL)],
        [{"function": TOOL["function"]}],
    ],
)
def test_tools_come_out_in_one_form(tools: Any) -> None:
    assert sample(messages=[USER, ANSWER], tools=tools).tools == (TOOL,)
    assert sample(prompt="q", completion="a", tools=tools).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]"])
def test_no_tools_may_be_said_in_several_ways(tools: Any) -> None:
    assert sample(messages=[USER, ANSWER], tools=tools).tools == ()


def test_ids_and_names_of_calls_and_results_are_kept() -> None:
    call = {"id": "c1", **CALL}
    result = {**RESULT, "tool_call_id": "c1", "name": "weather"}
    found = sample(messages=[USER, {**CALLING, "tool_calls": [call]}, result, ANSWER])
    assert found.messages[1]["tool_calls"] == [call]
    assert found.messages[2] == result


def test_a_call_without_arguments_has_none() -> None:
    for nothing in ({}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}):
        found = sample(
            messages=[USER, {"role": "assistant", "tool_calls": [{"name": "now", **nothing}]}]
        )
        assert found.messages[1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


def test_null_in_arguments_is_an_argument() -> None:
    call = {"name": "f", "arguments": '{"x": null}'}
    found = sample(messages=[USER, {"role": "assistant", "tool_calls": [call]}])
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": None}


def test_a_call_that_is_the_last_answer_stands_in_the_reference_as_json() -> None:
    line = '{"name": "weather", "arguments": {"city": "Cork", "days": 2}}'
    assert sample(messages=[USER, CALLING]).reference == line
    said = {**CALLING, "content": "I look.", "tool_calls": [CALL, CALL]}
    assert sample(messages=[USER, said]).reference == f"I look.\n{line}\n{line}"
    assert sample(messages=[USER, CALLING]).prompt == [USER]


def test_the_same_question_with_other_tools_is_another_prompt() -> None:
    bare = sample(messages=[USER, ANSWER])
    with_tool = sample(messages=[USER, ANSWER], tools=[TOOL])
    assert bare.prompt_key != with_tool.prompt_key
    assert with_tool.prompt_key == sample(messages=[USER, CALLING], tools=[TOOL]).prompt_key


def test_text_parts_are_put_together() -> None:
    parts = [{"type": "text", "text": "Rain "}, {"type": "text", "text": "in Cork?"}]
    assert sample(messages=[{**USER, "content": parts}, ANSWER]).messages[0] == USER
