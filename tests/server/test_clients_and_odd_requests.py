"""What users of other servers have reported, asked here by the clients that they used.

vLLM: 5734, 9693, 11363, 12376, 17393, 19419, 36947, 43244, 47901, 52011; SGLang: 8417, 9696;
LoRAX: 392, 643; llama.cpp: 4492, 19051, 24097; litellm: 19174, 14937, 29156; LM Studio: 261;
lm-format-enforcer: 94.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel

from served import Running, refused

CHATS = "/v1/chat/completions"
TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Cork", "Äre"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather.", "parameters": CITY},
}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop"}}
ASKS: list[Any] = [{"role": "user", "content": "a"}]


@pytest.fixture
def qwen(served: Running) -> Iterator[Running]:
    """The server, whose base has Qwen 3's template."""
    tokenizer = served.engine.tokenizer
    own, tokenizer.chat_template = tokenizer.chat_template, (TEMPLATES / "qwen3.jinja").read_text()
    yield served
    tokenizer.chat_template = own


def events(server: Running, **fields: Any) -> list[Any]:
    body = {"model": server.engine.model_name, "messages": ASKS, "stream": True, **fields}
    lines = server.post(CHATS, body).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def calls_of(streamed: list[Any]) -> list[tuple[str, Any]]:
    found: list[list[str]] = []
    for event in streamed:
        for call in event["choices"][0]["delta"].get("tool_calls", []):
            if call["index"] == len(found):
                found.append([call["function"]["name"], ""])
            found[call["index"]][1] += call["function"]["arguments"]
    return [(name, json.loads(arguments)) for name, arguments in found]


HERMES = "<tool_call>\n{}\n</tool_call>"


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        (['{"arguments": {"city": "Cork"}, "name": "get_weather"}'], [("get_weather", "Cork")]),
        (
            [
                '{"name": "stop", "arguments": {}}',
                '{"name": "get_weather", "arguments": {"city": "Äre"}}',
            ],
            [("stop", None), ("get_weather", "Äre")],
        ),
    ],
)
def test_streamed_calls_have_all_of_their_arguments(
    qwen: Running, calls: list[str], expected: list[Any]
) -> None:
    text = "\n".join(HERMES.format(call) for call in calls)
    streamed = events(qwen, tools=[WEATHER, STOP], guided_choice=[text], max_tokens=300)
    assert [(name, given.get("city")) for name, given in calls_of(streamed)] == expected
    assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("arguments", ["", "{}", None])
def test_calls_without_arguments_are_sent_back_as_clients_keep_them(
    qwen: Running, arguments: str | None
) -> None:
    function = {"name": "stop", **({} if arguments is None else {"arguments": arguments})}
    call = {"id": "6b17b9368", "type": "function", "function": function}
    messages = [
        *ASKS,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "6b17b9368", "content": "42.69"},
    ]
    body = {"model": qwen.engine.model_name, "messages": messages, "max_tokens": 2}
    status = qwen.post(CHATS, {**body, "tools": [STOP], "parallel_tool_calls": False}).status_code
    assert status == (400 if arguments is None else 200)  # OpenAI's API requires them


def test_one_call_at_most_where_parallel_calls_are_off(qwen: Running) -> None:
    fields: Any = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    for seed in range(4):
        streamed = events(qwen, **fields, seed=seed, temperature=1.5, max_tokens=300)
        assert len(calls_of(streamed)) == 1


def test_each_of_several_streamed_choices_ends_once(qwen: Running) -> None:
    streamed = events(qwen, n=3, max_tokens=5)
    choices = [choice for event in streamed for choice in event["choices"]]
    ends = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]


def test_a_stored_call_and_its_result_stand_before_the_next_turn(qwen: Running) -> None:
    client, fields = qwen.openai, {"model": qwen.engine.model_name, "max_output_tokens": 200}
    tool: Any = {"type": "function", "name": "get_weather", "parameters": CITY, "strict": True}
    asked: Any = {**fields, "tools": [tool], "temperature": 0}
    first = client.responses.create(
        input="a", tool_choice="required", parallel_tool_calls=False, **asked
    )
    call = next(item for item in first.output if item.type == "function_call")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    asked |= {"max_output_tokens": 5}
    on = client.responses.create(input=[result], previous_response_id=first.id, **asked)
    more = client.responses.create(input="b", previous_response_id=on.id, **asked)
    items: Any = [
        {"role": "user", "content": "a"},
        *[item.model_dump(exclude_none=True) for item in first.output],
        result,
        *[item.model_dump(exclude_none=True) for item in on.output],
        {"role": "user", "content": "b"},
    ]
    sent = client.responses.create(input=items, store=False, **asked)
    assert more.usage is not None
    assert sent.usage is not None
    assert more.usage.input_tokens == sent.usage.input_tokens
    assert more.output_text == sent.output_text


class Step(BaseModel):
    ideas: Literal["some", "none"]
    recall: Literal[0, 1]


def test_answers_are_parsed_where_the_model_may_think(qwen: Running) -> None:
    chats = qwen.openai.chat.completions
    made = chats.parse(
        model=qwen.engine.model_name, messages=ASKS, response_format=Step, max_tokens=200
    )
    assert isinstance(made.choices[0].message.parsed, Step)


FREE = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "tool_name": {"type": "string", "maxLength": 8},
            "parameters": {
                "type": "object",
                "additionalProperties": {
                    "anyOf": [{"type": "integer", "maximum": 99}, {"type": "boolean"}]
                },
            },
        },
        "required": ["tool_name", "parameters"],
        "additionalProperties": {},
    },
    "minItems": 1,
    "maxItems": 1,
}


def test_a_schema_with_free_properties_is_followed(served: Running) -> None:
    asked = {"model": "shop", "messages": ASKS, "guided_json": FREE, "max_tokens": 400}
    for seed in range(3):
        choice = served.post(CHATS, {**asked, "seed": seed}).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), FREE)


def test_a_schema_beside_json_object_is_followed(served: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"today": {"type": "string", "format": "date"}, "n": {"enum": [1, "b"]}},
        "required": ["today", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_object", "schema": schema}
    asked = {"model": "shop", "messages": ASKS, "response_format": form, "max_tokens": 400}
    choice = served.post(CHATS, asked).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    checker = jsonschema.FormatChecker()
    jsonschema.validate(json.loads(choice["message"]["content"]), schema, format_checker=checker)


def test_any_json_ends_by_itself(served: Running) -> None:
    asked = {"model": "shop", "messages": ASKS, "structured_outputs": {"json": {}}}
    found = served.post(CHATS, {**asked, "max_tokens": 400, "seed": 1}).json()["choices"][0]
    if found["finish_reason"] == "stop":
        json.loads(found["message"]["content"])


BAD_FORMS: list[dict[str, Any]] = [
    {"guided_json": {"type": "string", "pattern": "^hi there\\!(?=x)$"}},
    {"response_format": {"type": "text", "schema": {"type": "object"}}},
    {"guided_grammar": 'root ::= "a" | rout'},
    {"guided_grammar": "\\route"},
    {"guided_regex": "(a"},
]  # fmt: skip


@pytest.mark.parametrize("fields", BAD_FORMS, ids=range(len(BAD_FORMS)))
def test_a_form_that_cannot_be_kept_is_refused_and_never_left_out(
    served: Running, fields: dict[str, Any]
) -> None:
    refused(served.post(CHATS, {"model": "shop", "messages": ASKS, **fields}), 400)
    assert served.complete().status_code == 200


@pytest.mark.parametrize("tokens", [[-1], [10**6], [[1, -5]], [1.5], [], [[]], ""])
def test_tokens_that_are_none_are_refused(served: Running, tokens: Any) -> None:
    refused(served.post("/v1/embeddings", {"model": "shop", "input": tokens}), 400)


@pytest.mark.exhaustive
def test_langchain_and_litellm_embed_texts(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("langchain_openai")
    expected = served.openai.embeddings.create(model="shop", input=["hello"]).data[0].embedding
    made = openai.OpenAIEmbeddings(
        model="shop",
        base_url=f"{served.url}/v1",
        api_key="none",
        check_embedding_ctx_length=False,
    )
    assert made.embed_query("hello") == pytest.approx(expected, abs=1e-5)
    assert len(made.embed_documents([f"{n}" for n in range(140)])) == 140

    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    litellm = pytest.importorskip("litellm")
    how: Any = {"api_base": f"{served.url}/v1", "api_key": "none"}
    for encoding in (None, "float", "base64"):
        found = litellm.embedding(
            model="openai/shop", input=["hello"], encoding_format=encoding, **how
        )
        if encoding != "base64":
            assert found.data[0]["embedding"] == pytest.approx(expected, abs=1e-5)
    how |= {"max_output_tokens": 20, "temperature": 0}
    asked = litellm.responses(model=f"openai/{served.engine.model_name}", input="a", **how)
    assert asked.usage.output_tokens == 20
