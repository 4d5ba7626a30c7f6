"""The bodies of replies, in OpenAI's shapes with vLLM's additions to the list of models.

They are plain dictionaries, typed: a stream sends one an event, and nothing is checked twice.
"""

from __future__ import annotations

import json
from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic wants these before Python 3.12
)

from typing_extensions import TypedDict

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(TypedDict):
    """Tokens of prompts that had been computed for earlier requests."""

    cached_tokens: int


class Usage(TypedDict):
    """How many tokens a request took; a prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Rival(TypedDict):
    """A token that could stand in a place; `bytes` is null where it is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class Chosen(Rival):
    """The token that stands there."""

    top_logprobs: list[Rival]


class ChatLogprobs(TypedDict):
    """Of each token of an answer."""

    content: list[Chosen]
    refusal: None


class AnswerMessage(TypedDict):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The reply of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(TypedDict):
    """What is added to an answer."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    """An event's part of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    """One event of a streamed `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class CompletionLogprobs(TypedDict):
    """Of each token of a text, in lists of one length; `text_offset` counts characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One text, or an event's part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """The reply of `/v1/completions`, and an event of it, streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class Score(TypedDict):
    """What a reward model gives to one text or conversation, in a list of one number."""

    index: int
    object: Literal["pooling"]
    data: list[float]


class Pooling(TypedDict):
    """The reply of `/pooling`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: Usage


class ModelCard(TypedDict):
    """The base, or an adapter: `parent` is its base, `root` where it comes from.

    `input_modalities` are `text`, and `image` where pictures are read. `notice` is there where its
    user should know something: other weights, another chat template.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    input_modalities: list[str]
    notice: NotRequired[str]


class ModelList(TypedDict):
    """The reply of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(TypedDict):
    """The reply of `/health`."""

    status: Literal["ok"]


class ErrorDetail(TypedDict):
    """What is wrong: a line for people, words for programs, the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """The reply of whatever was refused."""

    error: ErrorDetail


def event(content: Any) -> bytes:
    """`content` as a server-sent event."""
    return (
        b"data: " + json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
    )
