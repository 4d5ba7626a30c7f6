"""What all bodies of requests are made of: objects whose every field is known, and their types."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lorakit.errors import did_you_mean
from lorakit.server.errors import UNKNOWN_FIELD

MAX_CHOICES = 128
MAX_INPUTS = 2048  # texts that are embedded or classified, as OpenAI has it
MAX_LOGPROBS = 20
MAX_ITEMS = 4096
MAX_FIELDS = 100

Item = TypeVar("Item")
# Checking holds everyone else up: a body of a million wrong things is refused at the first.
Items = Annotated[list[Item], Field(max_length=MAX_ITEMS, fail_fast=True)]


def _whole(value: Any) -> Any:
    """5.0 as 5: to JSON they are one, and languages with one kind of number write either."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
NoEntries = Annotated[dict[str, Any], Field(max_length=0)] | None


_ELSEWHERE = {
    "enable_thinking": ": give it in chat_template_kwargs",
    "extra_body": ": its fields stand beside the others in the JSON",
    "raw_scores": ": give use_activation: false",
    "texts": ": give documents",
    "return_text": ": give return_documents",
    "truncate": ": give truncate_prompt_tokens, -1 for as many as the model reads",
    "truncation_direction": ": give truncation_side",
}
"""Fields that clients put into the wrong place, or call as another server does."""


class Payload(BaseModel):
    """A JSON object whose every field is known; `ge` and `le` are its limits."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        items = data.items() if isinstance(data, dict) else ()
        unknown = next((name for name, value in items if not cls.is_known(name, value)), None)
        if unknown is None and len(items) > MAX_FIELDS:
            unknown = next(name for name in data if name not in cls.names())
        if unknown is not None:
            raise PydanticCustomError(
                UNKNOWN_FIELD,
                "is not a field that is known here{hint}",
                {
                    "name": unknown,
                    "hint": _ELSEWHERE.get(unknown) or did_you_mean(unknown, cls.names()),
                },
            )
        return data

    @classmethod
    def is_known(cls, name: str, value: Any) -> bool:
        """Whether there is a field of this name, or nothing in one that there is not."""
        return name in cls.names()

    @classmethod
    def names(cls) -> set[str]:
        """The fields as requests name them."""
        return {field.alias or name for name, field in cls.model_fields.items()}


class Replayed(Payload):
    """A part of an answer that clients send back, as `model_dump()` of their objects has it.

    Those have fields that no other client knows; null says that there is nothing in them.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, None]

    @classmethod
    def is_known(cls, name: str, value: Any) -> bool:
        return value is None or super().is_known(name, value)
