"""Calls that are read while they are written: the same as when they are read at their end."""

import json
from typing import Any

import pytest
from chat_families import family_tokenizer

from lorakit.data.call_stream import CallPiece
from lorakit.data.tool_calls import FORMS, CallForm, tool_calls_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"type": "string"},
                    "c": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "d": {"$ref": "#/$defs/number"},
                    "e": {"enum": ["5", 7]},
                },
                "$defs": {"number": {"type": "number"}},
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
BY_NAME = {form.name: form for form in FORMS}
ODD = 'x </y> {"z": [\\"w\'} ü\n\n'
BEGIN, SEP, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def json_text(name: str, key: str = "arguments", **arguments: Any) -> str:
    return json.dumps({"name": name, key: arguments})


ARGUMENTS = json.dumps({"a": 1, "b": ODD})
TEXTS = {
    "hermes": f"<tool_call>\n{json_text('add', a=1, b=ODD)}\n</tool_call>\n<tool_call>"
    f"{json_text('stop')}</tool_call>",
    "llama": f"{json_text('add', 'parameters', a=1, b=ODD)}; {json_text('stop', 'parameters')}",
    "mistral": f"[TOOL_CALLS] [{json_text('add', a=1, b=ODD)}, {json_text('stop')}]",
    "mistral names": f"[TOOL_CALLS]add[ARGS]{ARGUMENTS}[TOOL_CALLS]stop[ARGS]{{}}",
    "json list": f"<|tool_call|>[{json_text('add', a=1, b=ODD)}, {json_text('stop')}]",
    "deepseek": f"<｜tool▁calls▁begin｜>{BEGIN}function{SEP}add\n```json\n"
    f"{json.dumps({'a': 1, 'b': ODD})}\n```{END}\n{BEGIN}stop{SEP}{{}}{END}",
    "xml functions": f"<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n"
    f"{ODD}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=stop>\n</function>\n"
    "</tool_call>",
    "key and value tags": f"<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    f"<arg_key>b</arg_key>\n<arg_value>{ODD}</arg_value>\n</tool_call>\n<tool_call>stop</tool_call>",
}


def streamed(form: CallForm, text: str, size: int) -> list[CallPiece]:
    assert form.reader is not None
    reader = form.reader(TOOLS)
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    return [piece for part in parts for piece in reader.add(part)]


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_of_any_size_make_the_same_calls(name: str, size: int) -> None:
    form = BY_NAME[name]
    whole = form.read(TEXTS[name], TOOLS)
    assert [(call.name, call.arguments) for call in whole] == [
        ("add", {"a": 1, "b": ODD}),
        ("stop", {}),
    ]
    pieces = streamed(form, TEXTS[name], size)
    for index, call in enumerate(whole):
        own = [piece for piece in pieces if piece.index == index]
        assert [piece.name for piece in own if piece.name] == [call.name]
        assert json.loads("".join(piece.arguments for piece in own)) == call.arguments
        assert [piece.ended for piece in own] == [False] * (len(own) - 1) + [True]
    if size == 1:
        assert len(pieces) > 20


def test_a_text_that_no_tool_is_called_by_is_left_to_the_end() -> None:
    text = f"<tool_call>{json_text('other', a=1)}</tool_call>"
    assert streamed(BY_NAME["hermes"], text, 5) == []


TYPED = [
    ({"a": "7"}, {"a": 7}),
    ({"b": "7"}, {"b": "7"}),
    ({"c": "7"}, {"c": "7"}),  # no number goes there
    ({"c": "null"}, {"c": None}),
    ({"d": "2.5"}, {"d": 2.5}),  # by its $ref
    ({"e": "5"}, {"e": "5"}),  # the text is one of its values
    ({"e": "7"}, {"e": 7}),
    ({"unknown": "7"}, {"unknown": 7}),
]


@pytest.mark.parametrize(("written", "read"), TYPED)
def test_values_between_tags_have_the_types_of_the_schema(
    written: dict[str, str], read: dict[str, Any]
) -> None:
    pairs = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>" for key, text in written.items()
    )
    text, form = f"<tool_call>add\n{pairs}\n</tool_call>", BY_NAME["key and value tags"]
    [call] = form.read(text, TOOLS)
    assert call.arguments == read
    joined = "".join(piece.arguments for piece in streamed(form, text, 4))
    assert json.loads(joined) == read


def test_literals_of_python_and_of_json_are_both_read() -> None:
    form = BY_NAME["python list"]
    text = r"""[add(a=1, b="\u00e9\ud83d\ude00", c=null, d=[true, False, {"k": None}]), stop()]"""
    [call, other] = form.read(text, TOOLS)
    assert call.arguments == {"a": 1, "b": "é😀", "c": None, "d": [True, False, {"k": None}]}
    assert other.arguments == {}
    assert tool_calls_of(family_tokenizer("glm45")).form == BY_NAME["key and value tags"]


NOT_CLOSED = {  # the closing tag of a value is missing
    "xml functions": "<tool_call>\n<function=add>\n<parameter=a>\n1\n<parameter=b>\nx\n"
    "<parameter=y>\n</function> z\n</parameter>\n<parameter=c>\nnull\n</function>\n</tool_call>",
    "key and value tags": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1\n"
    "<arg_key>b</arg_key>\n<arg_value>x\n<parameter=y>\n</function> z</arg_value>\n"
    "<arg_key>c</arg_key>\n<arg_value>null\n</tool_call>",
}


@pytest.mark.parametrize("size", [1, 3, 10_000])
@pytest.mark.parametrize("name", NOT_CLOSED)
def test_a_value_that_is_not_closed_ends_where_the_next_one_begins(name: str, size: int) -> None:
    form, text = BY_NAME[name], NOT_CLOSED[name]
    arguments = {"a": 1, "b": "x\n<parameter=y>\n</function> z", "c": None}
    [call] = form.read(text, TOOLS)
    assert (call.name, call.arguments) == ("add", arguments)
    pieces = streamed(form, text, size)
    assert json.loads("".join(piece.arguments for piece in pieces)) == arguments
    assert pieces[-1].ended
