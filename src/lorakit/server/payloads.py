"""The bodies of requests, as OpenAI and vLLM have them.

What chats and completions have in common is `sampling_fields.py`'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.engine.sampling import Sampling
from lorakit.server.messages import ChatMessage, NamedTool, Tool
from lorakit.server.payload_parts import (
    MAX_CHOICES,
    MAX_INPUTS,
    MAX_LOGPROBS,
    WHOLE,
    Items,
    NoEntries,
    Nothing,
    Payload,
    Text,
    TokenIds,
)
from lorakit.server.sampling_fields import (
    CacheSalt,
    Cutting,
    Ignored,
    SamplingFields,
    Truncated,
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
    add_special_tokens: bool | None = Field(
        True, description="Whether a text gets the special tokens that the tokenizer adds."
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

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    add_generation_prompt: bool | None = Field(
        None, description="Whether the template asks for an answer behind the last message."
    )
    continue_final_message: bool | None = Field(
        False, description="The answer goes on with the last message, one of the assistant."
    )
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
    # vLLM's, which take their neutral value alone.
    echo: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None
    include_reasoning: Literal[True] | None = None
    chat_template: None = None
    documents: Nothing = None
    mm_processor_kwargs: NoEntries = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true; leave it out")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("give max_completion_tokens or max_tokens (its old name), not both")
        if any(message.pictures for message in self.messages):
            for name in ("prompt_logprobs", "truncate_prompt_tokens"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} does not go with pictures: leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_continued(self) -> ChatRequest:
        last = self.messages[-1]
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if last.role != "assistant" or last.tool_calls or not last.content:
            raise ValueError("continue_final_message needs a last message of the assistant's text")
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
        wants: `scores` of a reward model, `labels` of a classifier, or an `embedding`.
    """

    choices: ClassVar[int] = 1
    token_limit: ClassVar[int | None] = 1
    limit_field: ClassVar[str | None] = None
    wants: ClassVar[str] = "scores"

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    cache_salt: CacheSalt | None = Field(None, description="Nothing is kept of these prompts.")

    def sampling(self, max_new_tokens: int, choice: int) -> Sampling:
        """Nothing is written."""
        return Sampling(max_new_tokens=max_new_tokens, embeds=self.wants == "embedding")


class Embedded(Pooled):
    """What asks for embeddings."""

    wants: ClassVar[str] = "embedding"


class Classified(Pooled, Cutting):
    """What asks for what a classifier's head gives."""

    use_activation: bool | None = Field(
        None,
        description="Whether logits become probabilities or what else the model has for them; "
        "false gives the logits. True by default.",
    )


class PooledTexts(Pooled, Truncated):
    """Texts or token ids, of each of which numbers are asked for."""

    input: (
        Text
        | TokenIds
        | Annotated[
            list[Text | TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
        ]
    )

    def inputs(self) -> list[str | list[int]]:
        """The texts, one by one."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else [*given]


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
        return [*self.texts()]

    def texts(self) -> list[str | list[int]]:
        """The texts and tokens, of a request without a conversation."""
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
