"""The body of `POST /v1/responses`, and the chat that it means.

OpenAI's Responses API has items where chats have messages, and flat functions; what is answered is
the same, so a request becomes a `ChatRequest` and is checked as one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from lorakit.server.errors import bad_field, in_words
from lorakit.server.payload_parts import WHOLE, Items, Payload, Replayed, Text
from lorakit.server.payloads import ChatRequest
from lorakit.server.sampling_fields import CacheSalt, Ignored


class TextItemPart(Replayed):
    """A part of a message that is text; `logprobs` and `annotations` come with earlier answers."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class ImageItemPart(Replayed):
    """A part of a message that is a picture."""

    type: Literal["input_image"]
    image_url: Text
    detail: Literal["auto", "high"] | None = None


ItemPart = Annotated[TextItemPart | ImageItemPart, Field(discriminator="type")]


class MessageItem(Replayed):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[ItemPart]
    id: str | None = None
    status: str | None = None

    def message(self) -> dict[str, Any]:
        """As a chat has it."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        parts = [
            {"type": "text", "text": part.text}
            if isinstance(part, TextItemPart)
            else {"type": "image_url", "image_url": {"url": part.image_url}}
            for part in self.content
        ]
        return {"role": self.role, "content": parts}


class CallItem(Replayed):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: str
    id: str | None = None
    status: str | None = None


class CallOutputItem(Replayed):
    """What the function gave."""

    type: Literal["function_call_output"]
    call_id: Text
    output: str | Items[TextItemPart]
    id: str | None = None
    status: str | None = None


class ReasoningPart(Replayed):
    """A part of reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Replayed):
    """The reasoning of an earlier answer."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Items[ReasoningPart] | None = None
    content: Items[ReasoningPart] | None = None
    encrypted_content: None = None
    status: str | None = None


Item = MessageItem | CallItem | CallOutputItem | ReasoningItem


class FlatFunction(Payload):
    """A function that the model is told of."""

    type: Literal["function"]
    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(Payload):
    """The function that must be called."""

    type: Literal["function"]
    name: Text


class TextFormat(Payload):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Payload):
    """How the text of an answer is."""

    format: TextFormat | None = None
    verbosity: None = None


class ResponsesRequest(Ignored):
    """`POST /v1/responses`: the model's turn behind some items."""

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    input: Text | Annotated[Items[Item], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = False
    tools: Items[FlatFunction] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    reasoning: None = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: CacheSalt | None = None

    def messages(self) -> list[dict[str, Any]]:
        """The items as the messages of a chat; calls and reasoning join the answer they are of."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        made: list[dict[str, Any]] = []
        for item in self.input:
            if isinstance(item, CallOutputItem):
                given = item.output
                text = given if isinstance(given, str) else "".join(part.text for part in given)
                made.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
            elif isinstance(item, CallItem):
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                _answer(made, "tool_calls").setdefault("tool_calls", []).append(call)
            elif isinstance(item, ReasoningItem):
                thought = "".join(part.text for part in item.content or item.summary or ())
                if thought:
                    _answer(made, "").update(reasoning_content=thought)
            elif item.role == "assistant":
                _answer(made, "content").update(item.message())
            else:
                made.append(item.message())
        return made

    def chat(self, before: list[dict[str, Any]]) -> ChatRequest:
        """The chat that this means.

        Args:
            before: messages of the previous response's conversation.

        Raises:
            ApiError: 400, it would be none.
        """
        opening = [{"role": "system", "content": self.instructions}] if self.instructions else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*opening, *before, *self.messages()],
            "max_completion_tokens": self.max_output_tokens,
            "parallel_tool_calls": self.parallel_tool_calls,
            "chat_template_kwargs": self.chat_template_kwargs,
            "cache_salt": self.cache_salt,
            "stream": self.stream,
        }
        body |= {
            name: float(value)
            for name in ("temperature", "top_p")
            if (value := getattr(self, name)) is not None
        }
        if self.tools:
            body["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"})}
                for tool in self.tools
            ]
        choice = self.tool_choice
        if isinstance(choice, FlatChoice):
            body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif choice is not None:
            body["tool_choice"] = choice
        form = self.text.format if self.text is not None else None
        if form is not None:
            body["response_format"] = {"type": form.type}
            if form.type == "json_schema":
                schema = {"name": form.name, "schema": form.schema_, "strict": form.strict}
                body["response_format"]["json_schema"] = schema
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            found = error.errors()[0]
            place = in_words([step for step in found["loc"] if isinstance(step, str | int)])
            message = str(found["msg"]).removeprefix("Value error, ")
            raise bad_field(f"{place or 'the body'}: {message}", None, "invalid_value") from error


def _answer(made: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The answer that an item is of: the last message, if it is one without such an item yet."""
    last = made[-1] if made else {}
    taken = {"content": ("content",), "tool_calls": (), "": ("content", "tool_calls")}[key]
    if last.get("role") != "assistant" or any(last.get(name) for name in taken):
        made.append({"role": "assistant", "content": ""})
    return made[-1]
