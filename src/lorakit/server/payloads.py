"""The bodies of requests, as OpenAI and vLLM have them.

What cannot be done is a field that takes only its neutral value, so it is refused by its name and
the API's description says so. What is accepted and changes no answer stands under `Ignored`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lorakit.data import strict_json
from lorakit.data.conversations import IMAGE
from lorakit.data.spans import REASONING
from lorakit.engine.sampling import Sampling
from lorakit.errors import did_you_mean
from lorakit.server.errors import UNKNOWN_FIELD

MAX_CHOICES = 128
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
}
"""Fields that clients put into the wrong place."""


class Payload(BaseModel):
    """A JSON object whose every field is known; `ge` and `le` are its limits."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        items = data.items() if isinstance(data, dict) else ()
        unknown = next((name for name, value in items if not cls.is_known(name, value)), None)
        if unknown is None and len(items) > MAX_FIELDS:
            unknown = next(name for name in data if name not in cls.model_fields)
        if unknown is not None:
            raise PydanticCustomError(
                UNKNOWN_FIELD,
                "is not a field that is known here{hint}",
                {
                    "name": unknown,
                    "hint": _ELSEWHERE.get(unknown) or did_you_mean(unknown, cls.model_fields),
                },
            )
        return data

    @classmethod
    def is_known(cls, name: str, value: Any) -> bool:
        """Whether there is a field of this name, or nothing in one that there is not."""
        return name in cls.model_fields


class Replayed(Payload):
    """A part of an answer that clients send back, as `model_dump()` of their objects has it.

    Those have fields that no other client knows; null says that there is nothing in them.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, None]

    @classmethod
    def is_known(cls, name: str, value: Any) -> bool:
        return value is None or super().is_known(name, value)


class Ignored(Payload):
    """Fields that keep accounts or caches, or have the one value that changes no answer here."""

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # vLLM's.
    ignore_eos: Literal[False] | None = None
    min_tokens: Annotated[Literal[0], WHOLE] | None = None
    skip_special_tokens: Literal[True] | None = None
    stop_token_ids: Nothing = None


class StreamOptions(Payload):
    """`include_usage` sends the counts of tokens in a last event."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(Ignored):
    """What both ways to complete have in common: the model, and how tokens are chosen.

    `top_k`, `min_p` and `repetition_penalty` are vLLM's extensions.
    """

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logit_bias: NoEntries = None

    @model_validator(mode="after")
    def _check_streaming(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true; leave it out")
        return self

    @property
    def choices(self) -> int:
        """How many answers a prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        """How many tokens an answer may have; None as many as fit."""
        raise NotImplementedError

    @property
    def limit_field(self) -> str | None:
        """The field that says so; None where the client left it to the server."""
        names = ("max_completion_tokens", "max_tokens")
        given = (name for name in names if name in self.model_fields_set)
        return next((name for name in given if getattr(self, name) is not None), None)

    @property
    def rivals(self) -> int | None:
        """Of how many rivals of a token log-probabilities are wanted; None of no token."""
        raise NotImplementedError

    def sampling(self, max_new_tokens: int, choice: int) -> Sampling:
        """The engine's settings for the choice of this number."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            max_new_tokens=max_new_tokens,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            top_k=max(self.top_k or 0, 0),
            min_p=float(self.min_p or 0),
            repetition_penalty=float(self.repetition_penalty or 1),
            presence_penalty=float(self.presence_penalty or 0),
            frequency_penalty=float(self.frequency_penalty or 0),
            stop=tuple(stop),
            logprobs=self.rivals,
        )


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`: the model goes on from each prompt, a text or token ids."""

    prompt: (
        Text
        | TokenIds
        | Annotated[
            list[Text | TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
        ]
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = Field(
        None, description="Only n: the best of more than are wanted is not looked for."
    )
    echo: Literal[False] | None = False
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):
            raise ValueError("best_of other than n is not supported: leave it out")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def rivals(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


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
    strict: Literal[False] | None = None


class Tool(Payload):
    """A tool that the model is told of."""

    type: Literal["function"]
    function: ToolFunction
    cache_control: dict[str, Any] | None = None


class ResponseFormat(Payload):
    """The form of an answer; only plain text."""

    type: Literal["text"]


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`: the model's turn in a conversation.

    `tools` are shown to the model by its template; what it writes comes as text, calls too.
    """

    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    tools: Items[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables that the chat template reads, such as enable_thinking."
    )
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    prediction: NoEntries = None
    audio: None = None
    functions: Nothing = None
    function_call: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true; leave it out")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("give max_completion_tokens or max_tokens (its old name), not both")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def rivals(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools as chat templates know them."""
        if self.tool_choice == "none":
            return []
        without = {"cache_control"}
        return [tool.model_dump(exclude_none=True, exclude=without) for tool in self.tools or []]


class PoolingRequest(Ignored):
    """`POST /pooling`, vLLM's: a reward model scores texts, token ids, or one conversation."""

    choices: ClassVar[int] = 1
    token_limit: ClassVar[int | None] = 1
    limit_field: ClassVar[str | None] = None

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    input: (
        Text
        | TokenIds
        | Annotated[
            list[Text | TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
        ]
        | None
    ) = None
    messages: Annotated[Items[ChatMessage], Field(min_length=1)] | None = None
    encoding_format: Literal["float"] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> PoolingRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give input or messages, one of the two")
        if self.messages is not None and self.messages[-1].role != "assistant":
            raise ValueError("messages end with the answer that is scored, an assistant message")
        if any(message.pictures for message in self.messages or ()):
            raise ValueError("conversations with pictures are not scored: leave the pictures out")
        return self

    def inputs(self) -> list[str | list[int] | list[dict[str, Any]]]:
        """What is scored, one by one: texts, tokens, the messages of a conversation."""
        if self.messages is not None:
            return [[message.for_template() for message in self.messages]]
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else [*given]

    def sampling(self, max_new_tokens: int, choice: int) -> Sampling:
        """Nothing is written."""
        return Sampling(max_new_tokens=max_new_tokens)


class LoadAdapterRequest(Payload):
    """`POST /v1/load_lora_adapter`, vLLM's: `lora_path` lies below the server's adapter root.

    `load_inplace` replaces the adapter of this name; running answers finish on the old one.
    """

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool | None = False


class UnloadAdapterRequest(Payload):
    """`POST /v1/unload_lora_adapter`, vLLM's."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_int_id: Annotated[int, WHOLE] | None = None
