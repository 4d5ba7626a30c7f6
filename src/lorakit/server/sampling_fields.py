"""How the tokens of an answer are chosen and where it ends, by OpenAI's and vLLM's names.

What cannot be done is a field that takes only its neutral value, so it is refused by its name and
the API's description says so. What is accepted and changes no answer stands under `Ignored`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from lorakit.engine.sampling import Sampling
from lorakit.server.answer_forms import FormFields
from lorakit.server.payload_parts import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    WHOLE,
    NoEntries,
    Nothing,
    Payload,
    StopText,
    TokenId,
)

MAX_BIASES = 1024
MAX_STOP_TOKENS = 1024
Token = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


CacheSalt = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        description="Beginnings of prompts are shared with requests of the same salt alone.",
    ),
]


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
    request_id: str | None = None
    priority: Annotated[Literal[0], WHOLE] | None = None


class Truncated(Payload):
    """What shortens a prompt that is too long."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = Field(
        None,
        description="Only the last so many tokens of a prompt are read; -1: as many as the context "
        "has room for.",
    )

    @model_validator(mode="after")
    def _check_truncation(self) -> Truncated:
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens is 0, and a prompt is not empty: 1 or -1")
        return self

    @property
    def asked_for(self) -> int:
        """How many tokens of an answer the request asks for; 0 where it does not say."""
        return 0


class Cutting(Truncated):
    """The same for what is classified and scored, whose special tokens stay where they are."""

    truncation_side: Literal["left", "right"] | None = Field(
        None,
        description="Which end truncate_prompt_tokens cuts off; by default the tokenizer's own, "
        "and the left one of causal models.",
    )


class StreamOptions(Payload):
    """`include_usage` sends the counts of tokens in a last event, vLLM's other field in each."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(Ignored, FormFields, Truncated):
    """What both ways to complete have in common: the model, and how tokens are chosen.

    `top_k`, `min_p`, `repetition_penalty` and all from `ignore_eos` on are vLLM's extensions.
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
    ignore_eos: bool | None = Field(
        False, description="End tokens do not end an answer; stop, stop_token_ids and a form do."
    )
    min_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = Field(
        0, description="No end token, stop token or stop text before so many tokens."
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = Field(
        False, description="The stop text, or the text of the stop token, is part of the answer."
    )
    skip_special_tokens: bool | None = Field(
        True, description="False leaves the names of special tokens in the text."
    )
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=2**18, fail_fast=True)] | None
    ) = Field(None, description="No other tokens are chosen.")
    cache_salt: CacheSalt | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = Field(
        None, description="The log-probabilities of the prompt's tokens and of so many rivals."
    )
    # vLLM's, which take their neutral value alone.
    use_beam_search: Literal[False] | None = None
    length_penalty: Annotated[Literal[1], WHOLE] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    bad_words: Nothing = None
    logits_processors: Nothing = None
    return_token_ids: Literal[False] | None = None
    return_tokens_as_token_ids: Literal[False] | None = None
    vllm_xargs: NoEntries = None

    @model_validator(mode="after")
    def _check_streaming(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true; leave it out")
        if self.continuous_usage and not self.include_usage:
            raise ValueError("stream_options: continuous_usage_stats goes with include_usage: true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is not streamed: leave stream or it out")
        return self

    @model_validator(mode="after")
    def _check_least(self) -> SamplingFields:
        least, most = self.min_tokens or 0, self.token_limit
        if most is not None and least > most:
            raise ValueError(f"min_tokens is {least}, more than the {most} of {self.limit_field}")
        if least and (form := self.form()) is not None:
            raise ValueError(f"min_tokens does not go with {form[0]}, which says where it ends")
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
    def continuous_usage(self) -> bool:
        """Whether each event of a stream has the counts so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def asked_for(self) -> int:
        return self.token_limit or 0

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
            special_tokens=self._special_tokens or self.skip_special_tokens is False,
            logit_bias=tuple((int(k), float(v)) for k, v in (self.logit_bias or {}).items()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            cache_salt=self.cache_salt or "",
        )
