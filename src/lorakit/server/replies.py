"""The bodies of replies, in OpenAI's shapes with vLLM's additions to the list of models.

They are plain dictionaries, typed: a stream sends one an event, and nothing is checked twice.
"""

from __future__ import annotations

import json
import math
from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic wants these before Python 3.12
)

from typing_extensions import TypedDict

FinishReason = Literal["stop", "length", "tool_calls"]


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


class CalledFunction(TypedDict):
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


class AddedArguments(TypedDict):
    """Some more of a call's arguments; a call's first part has its name."""

    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    """What is added to a call of a streamed answer; the first part of each has its id."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: AddedArguments


class AnswerCall(TypedDict):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(TypedDict):
    """What the model says, calls, and has thought before."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[AnswerCall]]


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class PromptToken(TypedDict):
    """How likely a token is in a place of the prompt; `rank` 1 is the likeliest of all."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]
"""Of each token of a prompt, by the ids of tokens; null for the first."""


class ChatCompletion(TypedDict):
    """The reply of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[PromptLogprobs]


class Delta(TypedDict):
    """What is added to an answer."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[CallDelta]]


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
    """Of each token of a text, in lists of one length; `text_offset` counts characters.

    The first token of a prompt has none, so null.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One text, or an event's part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: NotRequired[PromptLogprobs]


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


class ResponseReply(TypedDict):
    """The reply of `/v1/responses`; `output` has messages, reasoning and calls."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: dict[str, Any]


class Embedding(TypedDict):
    """Of one text: numbers, or these as base64 of float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """How many tokens were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """The reply of `/v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class PairScore(TypedDict):
    """What a reward model gives to a pair of texts."""

    index: int
    object: Literal["score"]
    score: float


class Scores(TypedDict):
    """The reply of `/v1/score`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: Usage


class Classified(TypedDict):
    """The likeliest label of one text, and the probabilities of all in their order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(TypedDict):
    """The reply of `/classify`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class Document(TypedDict):
    """A document that was sorted."""

    text: str


class Ranked(TypedDict):
    """A document, where it stood, and what it was given."""

    index: int
    document: NotRequired[Document]
    relevance_score: float


class Reranked(TypedDict):
    """The reply of `/v1/rerank`."""

    id: str
    model: str
    usage: Usage
    results: list[Ranked]


class Tokens(TypedDict):
    """The reply of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """The reply of `/detokenize`."""

    prompt: str


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


def finite(logprob: float) -> float:
    """A log-probability as JSON can write it; OpenAI writes -9999 for that of what cannot be."""
    return max(logprob, -9999.0) if not math.isnan(logprob) else -9999.0


def event(content: Any) -> bytes:
    """`content` as a server-sent event."""
    return (
        b"data: " + json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
    )
