"""An answer taken apart is the same message, however it comes and wherever it is cut off."""

import json
import re
from typing import Any

import pytest

from lorakit.data.answer_form import AnswerForm
from lorakit.data.tool_calls import FORMS, CallForm, ToolCalls
from lorakit.server.message_parts import MessageParts

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object"}}},
]
ANSWERS = AnswerForm("", "", "", None, "", "", (("<think>", "</think>"),), re.compile("<never>"))
BEGIN, SEP, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
TEXT = 'x <y> {"z": [w} ü\n'


def call(name: str, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


FIRST, LAST = call("add", a=1, b=TEXT), call("stop", b="2")
HERMES = "<tool_call>\n{}\n</tool_call>\n"
TEXTS = {
    "hermes": f"Now.\n{HERMES.format(FIRST)}{HERMES.format(LAST)}",
    "xml functions": f"<think>\nhm\n</think>\n\n<tool_call>\n<function=add>\n<parameter=a>\n1\n"
    f"</parameter>\n<parameter=b>\n{TEXT}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n"
    "<function=stop>\n<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>",
    "key and value tags": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    f"<arg_key>b</arg_key>\n<arg_value>{TEXT}</arg_value>\n</tool_call>\n<tool_call>stop\n"
    "<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
    "mistral": f"[TOOL_CALLS] [{FIRST}, {LAST}]",
    "mistral names": f"[TOOL_CALLS]add[ARGS]{json.dumps({'a': 1})}[TOOL_CALLS]stop[ARGS]{{}}",
    "deepseek": f"<｜tool▁calls▁begin｜>{BEGIN}function{SEP}add\n```json\n"
    f"{json.dumps({'a': 1, 'b': TEXT})}\n```{END}\n{BEGIN}stop{SEP}{{}}{END}",
    "json list": f"<|tool_call|>[{FIRST}, {LAST}]",
    "llama": f"{FIRST}; {LAST}",
    "python list": '[add(a=1, b="x"), stop(b="2")]',
}
ODD = {
    "arguments in quotes": ("hermes", HERMES.format('{"name": "add", "arguments": "{}"}')),
    "no arguments": ("hermes", HERMES.format('{"name": "stop"}')),
    "the name behind": ("hermes", HERMES.format('{"arguments": {"a": 1}, "name": "add"}')),
    "no such function": ("hermes", HERMES.format(call("other", a=1))),
    "no text of JSON": ("hermes", HERMES.format('{"name": "\\q", "arguments": {}}')),
    "no JSON": ("hermes", HERMES.format('{"name": "add", "arguments": {a: 1}}')),
    "a list behind words": ("python list", "Sure: [stop()]"),
    "an object behind words": ("llama", f"Sure: {FIRST}"),
    "a thought": ("hermes", "<think>\nwhy < not \n\n</think>\n\n Yes <b>. \n"),
}
BY_NAME = {form.name: form for form in FORMS}


def message(form: CallForm, text: str, size: int, most: int | None = None) -> dict[str, Any]:
    """What clients make of an answer that comes in pieces of so many characters."""
    parts = MessageParts(ToolCalls(form, ANSWERS), TOOLS, most)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    said = [parts.add(piece) for piece in pieces] + [parts.add("", final=True)]
    calls: list[list[str]] = []
    for one in (one for some in said for one in some.calls):
        if one.id:
            assert one.index == len(calls)
            calls.append([one.name, ""])
        assert one.index == len(calls) - 1
        calls[-1][1] += one.arguments
    return {
        "content": "".join(some.content for some in said),
        "reasoning": "".join(some.reasoning for some in said),
        "calls": calls,
    }


def test_there_is_a_text_of_every_form() -> None:
    assert TEXTS.keys() == BY_NAME.keys()


@pytest.mark.parametrize("most", [None, 1])
@pytest.mark.parametrize("name", TEXTS)
def test_an_answer_that_is_cut_off_anywhere_is_the_same_streamed_and_whole(
    name: str, most: int | None
) -> None:
    form, text = BY_NAME[name], TEXTS[name]
    for end in range(len(text) + 1):
        whole = message(form, text[:end], 10_000, most)
        for size in (1, 5):
            assert message(form, text[:end], size, most) == whole, text[:end]
    found = form.opening.search(text)
    assert found is not None
    read = [(one.name, one.arguments) for one in form.read(text[found.start() :], TOOLS)]
    assert [(name, json.loads(given)) for name, given in whole["calls"]] == read[:most]


@pytest.mark.parametrize("behind", ["", HERMES.format(LAST)])
@pytest.mark.parametrize("case", ODD)
def test_what_is_odd_is_the_same_streamed_and_whole(case: str, behind: str) -> None:
    name, text = ODD[case]
    whole = message(BY_NAME[name], text + behind, 10_000)
    for size in (1, 3, 7):
        assert message(BY_NAME[name], text + behind, size) == whole


@pytest.mark.parametrize("case", ["arguments in quotes", "no arguments", "the name behind"])
def test_a_call_in_another_order_is_given_out_once(case: str) -> None:
    form, text = BY_NAME["hermes"], ODD[case][1] + HERMES.format(LAST)
    found = message(form, text, 3)["calls"]
    expected = [(one.name, one.arguments) for one in form.read(text, TOOLS)]
    assert [(name, json.loads(arguments)) for name, arguments in found] == expected


def test_a_call_that_is_cut_off_keeps_those_before_it() -> None:
    cut = TEXTS["hermes"][: TEXTS["hermes"].index('"2"')]
    found = message(BY_NAME["hermes"], cut, 10_000)
    assert found["content"] == "Now."
    [(_, first), (name, begun)] = found["calls"]
    assert json.loads(first) == {"a": 1, "b": TEXT}
    assert (name, begun) == ("stop", '{"b": ')
