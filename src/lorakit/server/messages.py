"""The messages and tools of a chat, as clients send them and send answers back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lorakit.data import strict_json
from lorakit.data.conversations import IMAGE
from lorakit.data.spans import REASONING
from lorakit.server.payload_parts import WHOLE, Items, Payload, Replayed, Text


class TextPart(Replayed):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None


class ImageUrl(Replayed):
    """Where a picture is: a data URL, or an address where the server fetches some."""

    url: Text
    detail: Literal["auto", "high"] | None = None


class ImagePart(Replayed):
    """A part of a message that is a picture, for models that read pictures."""

    type: Literal["image_url"]
    image_url: Text | ImageUrl
    cache_control: dict[str, Any] | None = None

    @property
    def url(self) -> str:
        """The address itself."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class CalledFunction(Replayed):
    """What the model called, and with what; `parsed_arguments` are the same again."""

    name: Text
    arguments: str | dict[str, Any]
    parsed_arguments: Any = None


class ToolCall(Replayed):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int, WHOLE] | None = None

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates know it: with arguments as an object, if they are one."""
        arguments: Any = self.function.arguments
        if isinstance(arguments, str):
            try:
                given = strict_json.parse(arguments or "{}")
            except ValueError:  # what a model wrote may be anything
                given = None
            arguments = given if isinstance(given, dict) else arguments
        function = {"name": self.function.name, "arguments": arguments}
        call: dict[str, Any] = {"type": self.type, "function": function}
        return call if self.id is None else {"id": self.id, **call}


class ChatMessage(Replayed):
    """One message of a conversation.

    `reasoning_content` (or `reasoning`, `thinking`) is what the model thought before an answer, for
    templates that read it.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[Part] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    # What clients send back with an earlier answer.
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    parsed: Any = None
    provider_specific_fields: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.role != "assistant":
            for key in ("tool_calls", *REASONING):
                if getattr(self, key):
                    raise ValueError(f"a message of the role {self.role} cannot have {key}")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.role == "assistant" and self.pictures:
            raise ValueError("an answer has no pictures: they are read, not written")
        return self

    @property
    def pictures(self) -> list[str]:
        """The addresses of its pictures."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.url for part in parts if isinstance(part, ImagePart)]

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it, and as training gives it to them."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self._content()}
        for key in ("name", "tool_call_id", *REASONING):
            if value := getattr(self, key):
                message[key] = value
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message

    def _content(self) -> str | list[dict[str, Any]]:
        parts = self.content or ""
        if isinstance(parts, str):
            return parts
        if not self.pictures:
            return "".join(part.text for part in parts if isinstance(part, TextPart))
        return [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": IMAGE, IMAGE: part.url}
            for part in parts
        ]


class ToolFunction(Payload):
    """A function that the model is told of."""

    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="Calls of it have arguments that its parameters accept."
    )


class Tool(Payload):
    """A tool that the model is told of."""

    type: Literal["function"]
    function: ToolFunction
    cache_control: dict[str, Any] | None = None


class NamedFunction(Payload):
    """The name of a function."""

    name: Text


class NamedTool(Payload):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction
