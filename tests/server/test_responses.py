"""`POST /v1/responses`, asked by OpenAI's client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from lorakit.server.errors import ApiError
from lorakit.server.responses import Conversations
from served import Running

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Cork", "Äre"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Answer(BaseModel):
    size: Literal["small", "large"]


@pytest.fixture
def asked(served: Running) -> Iterator[tuple[OpenAI, Any]]:
    """The client, and what every request of these has; the base takes Qwen 3's template."""
    tokenizer = served.engine.tokenizer
    own, tokenizer.chat_template = tokenizer.chat_template, (TEMPLATES / "qwen3.jinja").read_text()
    yield served.openai, {"model": served.engine.model_name, "max_output_tokens": 200}
    tokenizer.chat_template = own


def test_items_are_answered_as_a_chat_is(served: Running, asked: tuple[OpenAI, Any]) -> None:
    client, fields = asked
    fields |= {"max_output_tokens": 6, "temperature": 0}
    made = client.responses.create(input="hello", instructions="Be brief.", **fields)
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]
    chat = client.chat.completions.create(
        model=fields["model"], messages=messages, max_tokens=6, temperature=0
    )
    assert made.output_text == chat.choices[0].message.content
    assert made.status == "incomplete"
    assert made.usage is not None
    assert chat.usage is not None
    assert made.usage.input_tokens == chat.usage.prompt_tokens

    fields |= {"input": "hello", "instructions": "Be brief."}
    streamed = [*client.responses.create(stream=True, **fields)]
    assert [event.sequence_number for event in streamed] == list(range(len(streamed)))
    deltas = [event.delta for event in streamed if event.type == "response.output_text.delta"]
    assert "".join(deltas) == made.output_text
    assert streamed[-1].type == "response.incomplete"


def test_a_conversation_goes_on_behind_a_stored_response(asked: tuple[OpenAI, Any]) -> None:
    client, fields = asked
    first = client.responses.create(input="a", **fields, temperature=0)
    on = client.responses.create(input="b", previous_response_id=first.id, **fields, temperature=0)
    items: Any = [
        {"role": "user", "content": "a"},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"role": "user", "content": "b"},
    ]
    sent = client.responses.create(input=items, store=False, **fields, temperature=0)
    assert sent.output_text == on.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.create(input="b", previous_response_id=sent.id, **fields)


def test_answers_have_a_form_and_functions_are_called(asked: tuple[OpenAI, Any]) -> None:
    client, fields = asked
    parsed = client.responses.parse(input="a", text_format=Answer, **fields)
    assert isinstance(parsed.output_parsed, Answer)
    called = client.responses.create(
        input="a", tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **fields
    )
    [call] = called.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Cork", "Äre")
    on = client.responses.create(
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
        previous_response_id=called.id,
        tools=[TOOL],
        **fields,
    )
    assert on.output
    with client.responses.stream(
        input="a", tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **fields
    ) as stream:
        kinds = {event.type for event in stream}
        [streamed] = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert "response.function_call_arguments.done" in kinds


def test_what_cannot_be_done_is_refused(asked: tuple[OpenAI, Any]) -> None:
    client, fields = asked
    wrong: list[Any] = [
        {"tools": [{"type": "web_search"}]},
        {"reasoning": {"effort": "low"}},
        {"temperature": 9},
        {"tool_choice": "required"},
        {"input": [{"type": "item_reference", "id": "x"}]},
    ]
    for more in wrong:
        with pytest.raises(openai.BadRequestError):
            client.responses.create(**{"input": "a", **fields, **more})


def test_the_oldest_conversations_leave_and_are_found_by_their_owner_alone() -> None:
    kept = Conversations()
    for number in range(1025):
        kept.keep("ada", str(number), [{"n": number}])
    assert kept.find("ada", "1024") == [{"n": 1024}]
    for owner, ident in (("ada", "0"), ("bob", "1024")):
        with pytest.raises(ApiError) as refused:
            kept.find(owner, ident)
        assert refused.value.status_code == 404
    large = [{"text": "a" * (17 << 20)}]
    kept.keep("ada", "large", large)
    kept.keep("ada", "larger", large)  # 32 MiB at most
    assert kept.find("ada", "larger") == large
    with pytest.raises(ApiError):
        kept.find("ada", "large")
