"""Calls are read in the form in which a chat template writes them, whatever its name."""

from pathlib import Path
from typing import Any

import pytest
import trl
from chat_families import FAMILIES, family_tokenizer

from lorakit.data.spans import find_answers
from lorakit.data.tool_calls import MalformedCallError, ToolCalls, tool_calls_of
from tiny import byte_tokenizer

FORMS = {
    "chatml": None,
    "llama3": "llama",
    "mistral": None,
    "mistral_tools": "mistral",
    "gemma": None,
    "qwen3": "hermes",
    "qwen3_thinking": None,  # it does not show tools
    "glm4": None,
    "glm45": "key and value tags",
    "phi3": None,
    "phi4": None,
    "deepseek_v3": None,  # nor does this
    "deepseek_r1": None,
}
TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TRL_FORMS = {
    "qwen2_5": "hermes",
    "qwen3": "hermes",
    "qwen3_instruct_2507": "hermes",
    "qwen3_5_think": "xml functions",
    "qwen3_5_nothink": "xml functions",
    "qwen3_6": "xml functions",
    "nemotron_3_nano": "xml functions",
    "glm4moe": "key and value tags",
    "llama3_1": "llama",
    "llama3_2": "llama",
    "lfm2_2_5": "python list",
    "phi3": None,
    "gemma3": None,
}
ASKED = {"role": "user", "content": "2 + 2?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
        },
    },
}


def call(name: str = "add", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def qwen() -> ToolCalls:
    return tool_calls_of(family_tokenizer("qwen3"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_calls_are_read_as_they_are_written(name: str):
    tokenizer = family_tokenizer(name)
    reader = tool_calls_of(tokenizer)
    assert (reader.form and reader.form.name) == FORMS[name]
    if reader.form is None:
        return
    for arguments in ({"a": 2, "b": "7"}, {"a": -1, "b": "x </y> {\"z\": 'w'}\nü"}, {}):
        written = {"role": "assistant", "content": "", "tool_calls": [call(**arguments)]}
        found = find_answers([ASKED, written], tokenizer, [TOOL])
        start, end = found.spans[0]
        read = reader.message(found.text[start:end], [TOOL])
        calls = [{**one, "id": ""} for one in read["tool_calls"]]
        assert calls == [{**one, "id": ""} for one in written["tool_calls"]]
        assert read["content"] == ""


@pytest.mark.parametrize("name", TRL_FORMS)
def test_templates_as_their_models_ship_them_have_a_known_form(name: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    form = tool_calls_of(tokenizer).form
    assert (form and form.name) == TRL_FORMS[name]


def test_content_reasoning_and_several_calls_are_told_apart():
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    other = '<tool_call>{"name": "ping", "arguments": {}}</tool_call>'
    read = qwen().message(f"<think>\nI {one} not\n</think>\n\nLet me see.\n{one}\n{other}")
    assert read == {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": f"I {one} not",
        "tool_calls": [call(a=1), call("ping")],
    }
    assert qwen().message("Four.") == {"role": "assistant", "content": "Four."}
    unclosed = qwen().message(one.removesuffix("</tool_call>"))
    assert unclosed["tool_calls"] == [call(a=1)], "models forget the last mark"
    text = '{"name": "add", "arguments": "{\\"a\\": 1}"}'
    assert qwen().message(f"<tool_call>{text}</tool_call>")["tool_calls"] == [call(a=1)]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"type":"function"\n</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>" + "[" * 100_000,
        '<tool_call>{"name": "add", "arguments": {"a": 1}} and so on</tool_call>',
    ],
)
def test_a_call_that_cannot_be_read_is_no_call_and_not_silent(text: str):
    with pytest.raises(MalformedCallError):
        qwen().message(text)


def test_arguments_that_are_written_as_text_have_the_types_of_the_schema():
    reader = tool_calls_of(family_tokenizer("glm45"))
    text = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
    for written, value in (("75001", 75001), ("true", True), ("[1, 2]", [1, 2]), ("x", "x")):
        assert reader.message(text.format(written), [TOOL])["tool_calls"] == [call(a=value)]
    text = text.replace(">a<", ">b<")
    assert reader.message(text.format("75001"), [TOOL])["tool_calls"] == [call(b="75001")]


def test_ids_of_calls_are_kept():
    reader = tool_calls_of(family_tokenizer("mistral_tools"))
    text = '[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "abc123XYZ"}]'
    assert reader.message(text)["tool_calls"] == [{**call(), "id": "abc123XYZ"}]


def test_an_answer_in_json_is_no_call_of_llamas():
    reader = tool_calls_of(family_tokenizer("llama3"))
    assert reader.message('{"city": "Cork"}')["content"] == '{"city": "Cork"}'
    two = '{"name": "add", "parameters": {"a": 1}}; {"name": "ping", "parameters": {}}<|eot_id|>'
    assert reader.message(two)["tool_calls"] == [call(a=1), call("ping")]
