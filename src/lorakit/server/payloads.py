"""The bodies of requests, as OpenAI and vLLM have them.

What cannot be done is a field that takes only its neutral value, so it is refused by its name and
the API's description says so. What is accepted and changes no answer stands under `Ignored`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from lorakit.engine.sampling import Sampling
from lorakit.server.answer_forms import FormFields
from lorakit.server.messages import ChatMessage, NamedTool, Tool
from lorakit.server.payload_parts import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    WHOLE,
    Items,
    NoEntries,
    Nothing,
    Payload,
    StopText,
    Text,
    TokenIds,
)

MAX_BIASES = 1024
Token = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


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


class SamplingFields(Ignored, FormFields):
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
    logit_bias: Annotated[dict[Token, Bias], Field(max_length=MAX_BIASES)] | None = Field(
        None, description="What is added to the logits of tokens, by their ids."
    )

    @model_validator(mode="after")
    def _check_streaming(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true; leave it out")
        return self

    _special_tokens: bool = PrivateAttr(False)

    def keep_special_tokens(self) -> None:
        """Has the names of special tokens stand in answers, for who reads them there."""
        self._special_tokens = True

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
            grammar=form[1] if (form := self.form()) else None,
            special_tokens=self._special_tokens,
            logit_bias=tuple((int(k), float(v)) for k, v in (self.logit_bias or {}).items()),
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
    max_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = Field(
        None, description="So many answers are written, and the likeliest n by token returned."
    )
    echo: bool | None = Field(
        False, description="The prompt stands before the text, and in the log-probabilities."
    )
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.kept:
            raise ValueError(f"best_of is {self.best_of}, and n is {self.kept}: it is at least n")
        if self.choices > self.kept and self.stream:
            raise ValueError("best_of more than n is not streamed: the best is known at the end")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which goes with echo: true alone")
        if self.max_tokens == 0 and self.stream:
            raise ValueError("max_tokens 0 is not streamed: there is nothing to wait for")
        return self

    @property
    def kept(self) -> int:
        """How many answers a prompt gets of those that are written."""
        return 1 if self.n is None else self.n

    @property
    def choices(self) -> int:
        """How many answers a prompt are written."""
        return self.kept if self.best_of is None else self.best_of

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def rivals(self) -> int | None:
        return self.logprobs

    def sampling(self, max_new_tokens: int, choice: int) -> Sampling:
        made = super().sampling(max_new_tokens, choice)
        ranked = self.choices > self.kept and made.logprobs is None
        return replace(made, logprobs=0) if ranked else made

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`: the model's turn in a conversation.

    `tools` are shown to the model by its template, and calls are read in the template's form.
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
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
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

    @property
    def called(self) -> str | None:
        """The function that must be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def must_call(self) -> bool:
        """Whether some function must be called."""
        return self.called is not None or self.tool_choice == "required"

    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools as chat templates know them."""
        if self.tool_choice == "none":
            return []
        without: Any = {"cache_control": True, "function": {"strict"}}
        return [tool.model_dump(exclude_none=True, exclude=without) for tool in self.tools or []]


class Pooled(Ignored):
    """What asks for numbers of texts, and for no text.

    Attributes:
        scores: whether a reward model gives them.
    """

    choices: ClassVar[int] = 1
    token_limit: ClassVar[int | None] = 1
    limit_field: ClassVar[str | None] = None
    scores: ClassVar[bool] = True

    model: Annotated[str, Field(min_length=1, max_length=4096)]

    def sampling(self, max_new_tokens: int, choice: int) -> Sampling:
        """Nothing is written."""
        return Sampling(max_new_tokens=max_new_tokens, embeds=not self.scores)


class PoolingRequest(Pooled):
    """`POST /pooling`, vLLM's: a reward model scores texts, token ids, or one conversation."""

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
