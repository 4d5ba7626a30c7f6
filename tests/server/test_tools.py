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
            if "id" in call:
                assert call.pop("index") == len(calls)
                calls.append(call)
            else:
                assert call["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        made["finish_reason"] = event["finish_reason"] or made["finish_reason"]
    return made


def called(answer: Any) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in answer["message"]["tool_calls"]]
    return [(one["name"], json.loads(one["arguments"])) for one in functions]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "template", ["qwen3", "llama3", "mistral_tools", "glm45", "qwen3_coder", "llama4_python"]
)
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
    ("glm45", "<tool_call>stop</tool_call>", "", [("stop", {})]),  # GLM 4.7's, on one line
    (
        "qwen3_coder",
        "Now.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nÄre\n</parameter>\n"
        "<parameter=days>\n5\n</parameter>\n</function>\n</tool_call>",
        "Now.",
        [("get_weather", {"city": "Äre", "days": 5})],
    ),
    (
        "llama4_python",
        '[get_weather(city="Äre", days=2), stop()]',
        "",
        [("get_weather", {"city": "Äre", "days": 2}), ("stop", {})],
    ),
    (  # what Llama 4 writes as well
        "llama4_python",
        '{"type": "function", "name": "stop", "parameters": {}}',
        "",
        [("stop", {})],
    ),
    (
        "qwen3",
        '<tool_call>\n{"name": "no_such", "arguments": {"a": 1}}',
        "",
        [("no_such", {"a": 1})],
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


def test_calls_that_are_cut_off_say_length_and_are_the_same_streamed_and_whole(
    chat: Callable[..., Any],
) -> None:
    fields: Any = {"tools": TOOLS, "guided_choice": [f"{ONE}\n{ONE}"]}
    for tokens in range(56, 146, 9):
        whole, streamed = (
            choice(chat("qwen3", **fields, max_tokens=tokens, stream=stream))
            for stream in (False, True)
        )
        assert whole["finish_reason"] == streamed["finish_reason"] == "length"
        for answer in (whole, streamed):
            for call in answer["message"]["tool_calls"]:
                assert len(call.pop("id")) == 9
        assert whole["message"]["tool_calls"] == streamed["message"]["tool_calls"]
        assert (whole["message"]["content"] or "") == streamed["message"]["content"]
    first, _ = (call["function"]["arguments"] for call in whole["message"]["tool_calls"])
    assert json.loads(first) == {"city": "Cork"}


def test_arguments_are_streamed_while_they_are_written(chat: Callable[..., Any]) -> None:
    value = "a long text\nof two lines"
    tool = {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
        },
    }
    written = {
        "qwen3": '<tool_call>\n{"name": "write", "arguments": ' + json.dumps({"text": value}) + "}",
        "qwen3_coder": "<tool_call>\n<function=write>\n<parameter=text>\n"
        + value
        + "\n</parameter>\n</function>\n</tool_call>",
    }
    for template, text in written.items():
        reply = chat(template, tools=[tool], guided_choice=[text], stream=True)
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line[:7] == "data: {"]
        parts = [
            call["function"]["arguments"]
            for event in events
            for call in event["choices"][0]["delta"].get("tool_calls", [])
        ]
        assert len(parts) > len(value) / 2
        assert json.loads("".join(parts)) == {"text": value}


CHECKED: dict[str, Any] = {
    "note": {"type": "string", "maxLength": 6},
    "code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]$"},
    "kind": {"enum": ["a", "5", 7, None]},
    "level": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 3}, {"type": "null"}]},
    "either": {"anyOf": [{"$ref": "#/$defs/short"}, {"type": "null"}]},
    "sizes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
}
CHECKED_SCHEMA = {
    "type": "object",
    "properties": CHECKED,
    "required": ["note", "kind", "sizes"],
    "additionalProperties": False,
    "$defs": {"short": {"type": "string", "minLength": 1, "maxLength": 3}},
}


@pytest.mark.parametrize("template", ["glm45", "qwen3_coder", "llama4_python"])
def test_arguments_that_are_no_json_follow_their_schema(
    chat: Callable[..., Any], template: str
) -> None:
    tool = {"type": "function", "function": {"name": "note", "parameters": CHECKED_SCHEMA}}
    fields: Any = {"tools": [tool, STOP], "max_tokens": 1500, "temperature": 1.5}
    named = {"type": "function", "function": {"name": "note"}}
    for seed in range(4):
        whole = choice(chat(template, **fields, tool_choice=named, seed=seed))
        [(_, arguments)] = called(whole)
        jsonschema.validate(arguments, CHECKED_SCHEMA)
        streamed = choice(chat(template, **fields, tool_choice=named, seed=seed, stream=True))
        assert called(streamed) == called(whole)


REFUSED_PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({"type": "object", "properties": {"a": {"type": "string", "format": "date"}}}, "glm45"),
    ({"type": "object", "minProperties": 1}, "glm45"),
    ({"type": "object", "properties": {"a-b": {"type": "integer"}}}, "llama4_python"),
]


@pytest.mark.parametrize(("schema", "template"), REFUSED_PARAMETERS)
def test_a_schema_that_tags_cannot_be_held_to_is_refused(
    chat: Callable[..., Any], schema: dict[str, Any], template: str
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    error = refused(chat(template, tools=[tool], tool_choice="required"), 400)
    assert (error["param"], error["code"]) == ("tools", "unsupported_value")
    assert chat(template, tools=[tool], max_tokens=1).status_code == 200


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
    ("chatml", {"tools": TOOLS, "tool_choice": "required"}, "tools[0]"),
    ("qwen3", {"tools": [WEATHER, WEATHER]}, "tools"),
    ("qwen3", {"tools": [{"type": "function", "function": ODD}]}, "tools"),
    ("qwen3", {"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
]


def test_every_answer_to_a_prompt_makes_the_call(chat: Callable[..., Any]) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "n": 3}
    for template in ("qwen3", "glm45"):
        choices = chat(template, **fields, max_tokens=1200).json()["choices"]
        assert [one["finish_reason"] for one in choices] == ["tool_calls"] * 3
        for one in choices:
            [(name, arguments)] = called(one)
            jsonschema.validate(arguments, SCHEMAS[name])


def test_tools_with_a_hundred_thousand_characters_of_schemas_are_taken(
    chat: Callable[..., Any], served: Running
) -> None:
    text = {"type": "string", "description": "d" * 60}
    properties = {f"field_{n}": text for n in range(18)}
    schema = {"type": "object", "properties": properties, "required": ["field_1"]}
    tools = [
        {"type": "function", "function": {"name": f"tool_{n}", "parameters": schema}}
        for n in range(58)
    ]
    assert len(json.dumps(tools)) > 100_000
    fields: Any = {"tools": tools, "tool_choice": "required", "max_tokens": 2}
    reply = chat("qwen3", **fields, truncate_prompt_tokens=1000)
    assert choice(reply)["finish_reason"] == "length"


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
        [same] = streamed.tool_calls or []
        assert json.loads(same.function.arguments) == json.loads(call.function.arguments)
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
        made = model.with_structured_output(GetWeather, method=method, strict=True).invoke("a")
        assert isinstance(made, GetWeather)
    bound = model.bind_tools(
        [GetWeather], tool_choice="any", parallel_tool_calls=False, strict=True
    )
    answer = bound.invoke("a")
    assert answer.tool_calls[0]["name"] == "GetWeather"
    parts = [part for part in bound.stream("a") if part.tool_call_chunks]
    assert parts[0].tool_call_chunks[0]["name"] == "GetWeather"


@pytest.mark.exhaustive
def test_litellm_gets_structured_answers_calls_and_streams(
    served: Running, chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    litellm = pytest.importorskip("litellm")
    choice(chat("qwen3", max_tokens=1))
    asked: Any = {
        "model": f"openai/{served.engine.model_name}",
        "api_base": f"{served.url}/v1",
        "api_key": "none",
        "messages": [ASKS],
        "max_tokens": 400,
        "seed": 1,
    }
    made = litellm.completion(**asked, response_format=GetWeather)
    GetWeather.model_validate_json(made.choices[0].message.content)
    forced: Any = {**asked, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    [call] = litellm.completion(**forced).choices[0].message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    chunks = list(litellm.completion(**forced, stream=True))
    whole = litellm.stream_chunk_builder(chunks, messages=[ASKS])
    [streamed] = whole.choices[0].message.tool_calls
    assert streamed.function.name == call.function.name
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)
    assert whole.choices[0].finish_reason == "tool_calls"
