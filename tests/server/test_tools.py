"""Calls of functions: read from answers, forced by a grammar, streamed, and sent back."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from served import Running, refused

CHATS = "/v1/chat/completions"
TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
ASKS = {"role": "user", "content": "a"}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Cork", "Äre"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather.", "parameters": CITY},
}
STOP: dict[str, Any] = {
    "type": "function",
    "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}},
}
TOOLS = [WEATHER, STOP]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@pytest.fixture
def chat(served: Running) -> Iterator[Callable[..., Any]]:
    """Asks the base with a family's template; a stream is put together as clients do."""
    tokenizer = served.engine.tokenizer
    own = tokenizer.chat_template

    def ask(template: str, *, messages: list[Any] | None = None, **fields: Any) -> Any:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
        body = {
            "model": served.engine.model_name,
            "messages": messages or [ASKS],
            "max_tokens": 400,
            "seed": 1,
            **fields,
        }
        return served.post(CHATS, body)

    yield ask
    tokenizer.chat_template = own


def choice(response: Any) -> Any:
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()["choices"][0]
    made: Any = {"message": {"content": ""}, "finish_reason": None}
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        [event] = json.loads(line[6:])["choices"]
        for key in ("content", "reasoning_content"):
            if part := event["delta"].get(key):
                made["message"][key] = made["message"].get(key, "") + part
        for call in event["delta"].get("tool_calls", []):
            calls = made["message"].setdefault("tool_calls", [])
            assert call.pop("index") == len(calls)
            calls.append(call)
        made["finish_reason"] = event["finish_reason"] or made["finish_reason"]
    return made


def called(answer: Any) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in answer["message"]["tool_calls"]]
    return [(one["name"], json.loads(one["arguments"])) for one in functions]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("template", ["qwen3", "llama3", "mistral_tools"])
def test_a_call_that_is_required_is_made(
    chat: Callable[..., Any], template: str, stream: bool
) -> None:
    fields = {"tool_choice": "required", "parallel_tool_calls": False}
    answer = choice(chat(template, tools=TOOLS, stream=stream, max_tokens=1200, **fields))
    assert answer["finish_reason"] == "tool_calls"
    assert not answer["message"]["content"]
    [(name, arguments)] = called(answer)
    jsonschema.validate(arguments, SCHEMAS[name])
    [call] = answer["message"]["tool_calls"]
    assert call["type"] == "function"
    assert len(call["id"]) == 9


def test_a_named_function_is_called_and_no_other(chat: Callable[..., Any]) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for seed in range(3):
        answer = choice(chat("qwen3", tools=TOOLS, tool_choice=named, seed=seed))
        [(name, arguments)] = called(answer)
        assert name == "get_weather"
        assert answer["finish_reason"] == "stop"  # as OpenAI has it
        jsonschema.validate(arguments, CITY)


ONE = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Cork"}}\n</tool_call>'
READ: list[tuple[str, str, str, list[Any]]] = [
    ("qwen3", ONE, "", [("get_weather", {"city": "Cork"})]),
    ("qwen3", f"Let me look.\n{ONE}", "Let me look.", [("get_weather", {"city": "Cork"})]),
    (
        "qwen3",
        f'{ONE}\n<tool_call>\n{{"name": "stop", "arguments": {{}}}}\n</tool_call>',
        "",
        [("get_weather", {"city": "Cork"}), ("stop", {})],
    ),
    ("qwen3", "<tool_call>\n{not json", "<tool_call>\n{not json", []),
    ("qwen3", "a < b and [c]", "a < b and [c]", []),
    (
        "llama3",
        '{"name": "get_weather", "parameters": {"city": "Äre"}}',
        "",
        [("get_weather", {"city": "Äre"})],
    ),
    ("llama3", '{"colour": "red"}', '{"colour": "red"}', []),
    (
        "llama3",
        '{"type": "function", "name": "stop", "parameters": {}}',
        "",
        [("stop", {})],
    ),
    (
        "mistral_tools",
        '[TOOL_CALLS] [{"name": "stop", "arguments": {}, "id": "abcdefghi"}]',
        "",
        [("stop", {})],
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("template", "text", "content", "calls"), READ, ids=range(len(READ)))
def test_calls_are_read_in_the_form_of_the_template(
    chat: Callable[..., Any], template: str, text: str, content: str, calls: Any, stream: bool
) -> None:
    answer = choice(chat(template, tools=TOOLS, guided_choice=[text], stream=stream))
    assert (answer["message"]["content"] or "") == content
    assert ("tool_calls" in answer["message"]) == bool(calls)
    if calls:
        assert called(answer) == calls
    assert answer["finish_reason"] == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_stands_beside_the_content(chat: Callable[..., Any], stream: bool) -> None:
    text = "<think>\nwhy < not\n</think>\n\nYes <b>.\n"
    answer = choice(chat("qwen3", guided_choice=[text], stream=stream))
    assert answer["message"]["reasoning_content"].strip() == "why < not"
    assert answer["message"]["content"].strip() == "Yes <b>."
    with_call = choice(chat("qwen3", guided_choice=[text + ONE], tools=TOOLS, stream=stream))
    assert with_call["message"]["reasoning_content"].strip() == "why < not"
    assert called(with_call) == [("get_weather", {"city": "Cork"})]
    plain = choice(chat("qwen3", guided_choice=[" a thought <think>"], stream=stream))
    assert plain["message"]["content"] == " a thought <think>"


def test_a_call_that_is_cut_off_is_none_and_says_length(chat: Callable[..., Any]) -> None:
    for stream in (False, True):
        fields: Any = {"tools": TOOLS, "tool_choice": "required", "stream": stream}
        answer = choice(chat("qwen3", max_tokens=30, **fields))
        assert answer["finish_reason"] == "length"
        assert "tool_calls" not in answer["message"]


def test_strict_functions_get_arguments_of_their_schema(chat: Callable[..., Any]) -> None:
    strict = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]
    begun = '<tool_call>\n{"name": "get_weather", "arguments": '
    for seed in range(4):
        answer = choice(chat("qwen3", tools=strict, seed=seed, max_tokens=60, temperature=2))
        assert begun not in (answer["message"]["content"] or "")


UNNAMED = {"type": "function", "function": {"name": "x"}}
ODD = {"name": "f", "strict": True, "parameters": {"not": {}}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"tool_choice": "required"}, "tool_choice"),
    ("qwen3", {"tools": TOOLS, "tool_choice": UNNAMED}, "tool_choice"),
    ("glm45", {"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    ("chatml", {"tools": TOOLS, "tool_choice": "required"}, "tools[0]"),
    ("qwen3", {"tools": [WEATHER, WEATHER]}, "tools"),
    ("qwen3", {"tools": [{"type": "function", "function": ODD}]}, "tools"),
    ("qwen3", {"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
]


@pytest.mark.parametrize(("template", "fields", "param"), REFUSED, ids=range(len(REFUSED)))
def test_a_choice_that_cannot_be_kept_is_refused_by_name(
    chat: Callable[..., Any], template: str, fields: dict[str, Any], param: str
) -> None:
    assert refused(chat(template, **fields), 400)["param"] == param


class GetWeather(BaseModel):
    city: Literal["Cork", "Äre"]


def test_the_clients_helpers_run_a_loop_with_tools(
    served: Running, chat: Callable[..., Any]
) -> None:
    choice(chat("qwen3", max_tokens=1))  # has the base take the template
    chats, model = served.openai.chat.completions, served.engine.model_name
    tool = openai.pydantic_function_tool(GetWeather)
    messages: list[Any] = [ASKS]
    for turn in range(2):
        asked: Any = {"model": model, "messages": messages, "tools": [tool], "seed": turn}
        reply = chats.parse(tool_choice="required", parallel_tool_calls=False, **asked)
        [call] = reply.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, GetWeather)
        with chats.stream(tool_choice="required", parallel_tool_calls=False, **asked) as stream:
            kinds = {event.type for event in stream}
            streamed = stream.get_final_completion().choices[0].message
        assert "tool_calls.function.arguments.done" in kinds
        assert [one.function.arguments for one in streamed.tool_calls or []] == [
            call.function.arguments
        ]
        messages += [
            reply.choices[0].message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        ]


@pytest.mark.exhaustive
def test_langchain_gets_structured_answers_and_calls(
    served: Running, chat: Callable[..., Any]
) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    choice(chat("qwen3", max_tokens=1))
    model = langchain_openai.ChatOpenAI(
        model=served.engine.model_name,
        base_url=f"{served.url}/v1",
        api_key="none",
        max_tokens=300,
        seed=1,
    )
    for method in ("json_schema", "function_calling"):
        made = model.with_structured_output(GetWeather, method=method).invoke("a")
        assert isinstance(made, GetWeather)
    bound = model.bind_tools([GetWeather], tool_choice="any", parallel_tool_calls=False)
    answer = bound.invoke("a")
    assert answer.tool_calls[0]["name"] == "GetWeather"
    parts = [part for part in bound.stream("a") if part.tool_call_chunks]
    assert parts[0].tool_call_chunks[0]["name"] == "GetWeather"
