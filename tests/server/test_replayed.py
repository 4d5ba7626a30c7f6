"""What clients send back with an earlier answer, and what of a chat the template must show."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage, ParsedChatCompletionMessage

from lorakit.data.templates import render
from served import Running, refused

CHATS = "/v1/chat/completions"
TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
ASKS = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.fixture
def chat(served: Running) -> Iterator[Callable[..., Any]]:
    """Asks the base with a template of a family's; its default is the base's own."""
    tokenizer = served.engine.tokenizer
    own = tokenizer.chat_template

    def ask(messages: list[Any], template: str | None = None, **fields: Any) -> Any:
        if template is not None:
            found = TEMPLATES / f"{template}.jinja"
            tokenizer.chat_template = found.read_text() if found.is_file() else template
        body = {"model": served.engine.model_name, "messages": messages, "max_tokens": 1, **fields}
        return served.post(CHATS, body)

    yield ask
    tokenizer.chat_template = own


def prompt_tokens(response: Any) -> int:
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens"])


def tokens_in_training(served: Running, messages: list[Any], **options: Any) -> int:
    """How many tokens the conversation has as training renders it."""
    tokenizer = served.engine.tokenizer
    text = render(messages, tokenizer, add_generation_prompt=True, **options)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def turns(answer: dict[str, Any]) -> list[Any]:
    return [ASKS, answer, {"role": "user", "content": "c"}]


ANSWER = {"role": "assistant", "content": "b"}
NOTHING: list[dict[str, Any]] = [
    ChatCompletionMessage(role="assistant", content="b").model_dump(),
    ParsedChatCompletionMessage[Any](role="assistant", content="b").model_dump(),
    {**ANSWER, "reasoning_content": None, "reasoning": None, "thinking": None},
    {**ANSWER, "reasoning_content": ""},
    {**ANSWER, "parsed": {"answer": "b"}, "refusal": None, "annotations": [], "audio": None},
    {**ANSWER, "annotations": [{"type": "url_citation", "url_citation": {"url": "x"}}]},
    {**ANSWER, "function_call": None, "tool_calls": None, "tool_call_id": None, "name": None},
    {**ANSWER, "tool_calls": []},
    {**ANSWER, "provider_specific_fields": {"refusal": None}, "cache_control": None},
    {**ANSWER, "thinking_blocks": None, "a_field_of_tomorrow": None},
    {**ANSWER, "content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
    {**ANSWER, "content": [{"type": "text", "text": "b", "annotations": None}]},
]


@pytest.mark.parametrize("answer", NOTHING, ids=range(len(NOTHING)))
def test_an_answer_that_is_sent_back_as_it_came_is_the_answer(
    chat: Callable[..., Any], answer: dict[str, Any]
) -> None:
    assert prompt_tokens(chat(turns(answer))) == prompt_tokens(chat(turns(ANSWER)))


def test_the_clients_own_answer_can_be_sent_back(served: Running) -> None:
    asked: list[Any] = [ASKS]
    for _ in range(3):
        reply = served.openai.chat.completions.create(model="shop", messages=asked, max_tokens=4)
        asked += [reply.choices[0].message.model_dump(), ASKS]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens > 50


IGNORED: dict[str, Any] = {
    "chat_template_kwargs": {},
    "store": True,
    "metadata": {"a": "b"},
    "user": "u",
    "logit_bias": {},
    "stop_token_ids": [],
    "ignore_eos": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "bad_words": [],
    "priority": 0,
    "echo": False,
    "add_special_tokens": False,
    "include_reasoning": True,
    "chat_template": None,
    "response_format": {"type": "text"},
    "tools": [],
    "functions": None,
    "reasoning_effort": None,
}


def test_fields_that_change_nothing_are_taken(chat: Callable[..., Any]) -> None:
    plain = prompt_tokens(chat([ASKS]))
    for name, value in IGNORED.items():
        assert prompt_tokens(chat([ASKS], **{name: value})) == plain, name
        assert prompt_tokens(chat([ASKS], **{name: None})) == plain, name


WRONG: list[tuple[list[Any], dict[str, Any], str]] = [
    (turns({**ANSWER, "a_field_of_tomorrow": 1}), {}, "messages[1].a_field_of_tomorrow"),
    (turns({**ANSWER, "refusal": "no"}), {}, "messages[1].refusal"),
    (turns({**ANSWER, "audio": {"id": "x"}}), {}, "messages[1].audio"),
    ([{**ASKS, "reasoning_content": "why"}], {}, "messages[0]"),
    ([ASKS], {"chat_template": "x"}, "chat_template"),
    ([ASKS], {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ([ASKS], {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("messages", "fields", "param"), WRONG)
def test_what_would_change_something_is_refused_by_name(
    chat: Callable[..., Any], messages: list[Any], fields: dict[str, Any], param: str
) -> None:
    assert refused(chat(messages, **fields), 400)["param"] == param


HIDDEN: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("mistral", [{"role": "system", "content": "a"}], {}, "messages[0].content"),
    ("mistral", [{"role": "developer", "content": "a"}], {}, "messages[0].content"),
    ("mistral", [ASKS], {"tools": [TOOL]}, "tools[0]"),
    ("gemma", [ASKS], {"tools": [TOOL]}, "tools[0]"),
    ("chatml", [ASKS], {"tools": [TOOL]}, "tools[0]"),
    ("chatml", turns({**ANSWER, "reasoning_content": "w"}), {}, "messages[1].reasoning_content"),
    ("glm4", turns({**ANSWER, "tool_calls": [CALL]}), {}, "messages[1].tool_calls"),
]


@pytest.mark.parametrize(("template", "messages", "fields", "param"), HIDDEN)
def test_what_the_template_does_not_show_is_an_error(
    chat: Callable[..., Any],
    template: str,
    messages: list[Any],
    fields: dict[str, Any],
    param: str,
) -> None:
    error = refused(chat(messages, template, **fields), 400)
    assert (error["param"], error["code"]) == (param, "unsupported_value")
    assert "the chat template" in error["message"]


def test_tools_that_are_not_to_be_called_need_not_be_shown(chat: Callable[..., Any]) -> None:
    assert chat([ASKS], "mistral", tools=[TOOL], tool_choice="none").status_code == 200


@pytest.mark.parametrize("template", ["qwen3", "qwen3_thinking", "glm45"])
def test_reasoning_is_read_as_in_training(
    served: Running, chat: Callable[..., Any], template: str
) -> None:
    thought = {**ANSWER, "reasoning_content": "why it is so"}
    for messages in (turns(thought), [ASKS, thought], [ASKS, {**ANSWER, "reasoning": "why"}]):
        found = prompt_tokens(chat(messages, template))
        assert found == tokens_in_training(served, messages)
    assert prompt_tokens(chat([ASKS, thought], template)) != prompt_tokens(chat([ASKS, ANSWER]))


@pytest.mark.parametrize("template", ["qwen3", "llama3", "glm45", "deepseek_v3"])
def test_calls_are_read_as_in_training_though_their_arguments_come_as_text(
    served: Running, chat: Callable[..., Any], template: str
) -> None:
    result = {"role": "tool", "tool_call_id": "call_1", "content": "25"}
    as_text = [ASKS, {**ANSWER, "content": None, "tool_calls": [CALL]}, result]
    function = {"name": "f", "arguments": {"x": 1}}
    trained = [ASKS, {"role": "assistant", "content": "", "tool_calls": [
        {**CALL, "function": function}]}, result]  # fmt: skip
    shown = {} if template == "deepseek_v3" else {"tools": [TOOL]}
    found = prompt_tokens(chat(as_text, template, **shown))
    assert found == tokens_in_training(served, trained, **shown)


def test_variables_of_the_template_are_passed_to_it(chat: Callable[..., Any]) -> None:
    template = (
        "{{ messages[0].content }}{{ 'xyz' if enable_thinking is defined and enable_thinking }}"
    )

    def ask(**variables: Any) -> Any:
        return chat([ASKS], template, chat_template_kwargs=variables)

    assert prompt_tokens(ask()) == prompt_tokens(ask(enable_thinking=False)) == 1
    assert prompt_tokens(ask(enable_thinking=True)) == 4
    error = refused(ask(enable_thinkin=True), 400)
    assert error["param"] == "chat_template_kwargs"
    assert "enable_thinking" in error["message"]
    for name in ("tokenize", "chat_template", "messages", "tools", "eos_token"):
        refused(ask(**{name: "x"}), 400)


ITEMS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% for name, value in c.function.arguments | items %}{{ name }}={{ value }}{% endfor %}"
    "{% endfor %}{% endfor %}"
)
AS_TEXT = ITEMS.replace(
    "c.function.arguments | items", "[('json', '' ~ c.function.arguments + '')]"
)


@pytest.mark.parametrize("template", [ITEMS, AS_TEXT])
def test_templates_that_want_an_object_or_a_text_as_arguments_get_it(
    chat: Callable[..., Any], template: str
) -> None:
    answer = {
        "role": "assistant",
        "tool_calls": [CALL],
    }  # also without content, as clients leave it
    messages = [ASKS, answer, {"role": "tool", "tool_call_id": "call_1", "content": "25"}]
    shown = "a" + ("x=1" if template is ITEMS else 'json={"x": 1}') + "25"
    assert prompt_tokens(chat(messages, template)) == len(shown)


def test_an_empty_answer_can_be_sent_back(chat: Callable[..., Any]) -> None:
    assert chat(turns({"role": "assistant", "content": ""})).status_code == 200
    refused(chat(turns({"role": "assistant", "content": None})), 400)


@pytest.mark.parametrize("field", ["enable_thinking", "extra_body"])
def test_what_stands_in_the_wrong_place_is_told_where_it_belongs(
    chat: Callable[..., Any], field: str
) -> None:
    error = refused(chat([ASKS], **{field: {"enable_thinking": False}}), 400)
    assert error["param"] == field
    assert ("chat_template_kwargs" if field == "enable_thinking" else "beside") in error["message"]
