"""What `model.generate` is given: the prompt's tokens, how the next token is chosen, where to end.

Models bring a generation configuration of their own, whose fields fill whatever a caller leaves
unset. Here it is put aside, so that the same call means the same on every model.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.answer_form import answer_form
from lorakit.data.bounded_templates import isolated_templates
from lorakit.data.conversations import Message
from lorakit.data.templates import render
from lorakit.engine.bounded_tokens import tokens_within
from lorakit.engine.grammar import Grammar
from lorakit.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def prompt_tokens(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[dict[str, Any]] = (),
    limit: int | None = None,
) -> list[int]:
    """The conversation as token ids, up to where the model's answer begins.

    Args:
        tools: the descriptions of functions that the template shows to the model.
        limit: how many tokens there may be; None for any number.

    Raises:
        InputError: the chat template refuses the conversation, or there is no template.
        TooManyTokensError: there are more than `limit`.
    """
    text = prompt_text(messages, tokenizer, tools)
    # The template has written the special tokens, a BOS among them.
    return tokens_within(text, tokenizer, sys.maxsize if limit is None else limit)


def prompt_text(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    """The conversation up to where the model's answer begins; arguments as of `prompt_tokens`.

    Raises:
        InputError: the chat template refuses the conversation, or there is no template.
    """
    with isolated_templates():
        return render(messages, tokenizer, add_generation_prompt=True, tools=tools)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and how many at most.

    Args:
        temperature: what logits are divided by; 0 always takes the likeliest token.
        top_p: sample from the likeliest tokens that together reach this probability, in (0, 1].
        max_new_tokens: at most so many tokens an answer, at least 1.
        seed: makes sampled answers repeatable.
        top_k: sample from so many of the likeliest tokens; 0 from all.
        min_p: sample from tokens at least this share as likely as the likeliest, in [0, 1].
        repetition_penalty: what the logits of tokens that are there already are divided by (those
            below 0 multiplied; Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty: taken off the logits of tokens that the answer has, in [-2, 2] (OpenAI's).
        frequency_penalty: as many times as the answer has them, in [-2, 2].
        stop: texts that end an answer, and are no part of it.
        stop_token_ids: further tokens that end an answer (vLLM's name, as all that follow).
        ignore_eos: `end_tokens` and the template's end mark do not end an answer.
        min_tokens: no end token, stop token or stop text before so many tokens.
        include_stop_str_in_output: the stop text, or the token that ends, is part of the answer.
        allowed_token_ids: no other tokens are chosen; empty for any.
        logprobs: log-probabilities of each token, and of so many of its likeliest rivals.
        end_tokens: what ends an answer; None for the end tokens of the model and its template.
        scaled_logprobs: log-probabilities are of logits / temperature, before anything else.
        grammar: what an answer must look like; None for any text.
        embeds: the prompt's embedding is wanted, and no answer.
        logit_bias: what is added to the logits of tokens, as pairs of a token and a number.
        special_tokens: whether the names of special tokens stand in the answer's text.
        cache_salt: what of the past is kept is for requests with the same text alone (vLLM's).

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    end_tokens: frozenset[int] | None = None
    scaled_logprobs: bool = False
    grammar: Grammar | None = None
    special_tokens: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    embeds: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    allowed_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be from 0 to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InputError(f"{name} must be from -2 to 2, not {getattr(self, name)}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InputError(f"seed must fit 64 bits, and {self.seed} does not")
        if any(not text for text in self.stop):
            raise InputError("stop must not hold an empty text, which would end every answer")
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"logprobs must be 0 or more, not {self.logprobs}")
        if self.min_tokens < 0:
            raise InputError(f"min_tokens must be 0 or more, not {self.min_tokens}")


def greedy_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Settings for `model.generate`: the likeliest tokens up to any of `end_tokens`.

    Raises:
        InputError: `max_new_tokens` is below 1.
    """
    from transformers import GenerationConfig

    ends = end_tokens(model, tokenizer)
    own_pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=Sampling(max_new_tokens=max_new_tokens).max_new_tokens,
        eos_token_id=ends or None,
        # Padding is masked, so any token will do.
        pad_token_id=own_pad if isinstance(own_pad, int) else (ends or [0])[0],
    )


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each int64 of shape (len(rows), longest row)."""
    import torch

    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return input_ids, mask


def generate(model: Any, settings: GenerationConfig, **inputs: Any) -> torch.Tensor:
    """`model.generate` by `settings` and nothing else: (batch, prompt + answer) token ids.

    The model's own generation configuration is out of the way meanwhile: a `max_length` there
    would warn, and a `repetition_penalty` would change the answers.
    """
    import torch

    from lorakit.models.loaded import copied_once

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, inner.generation_config = inner.generation_config, settings
    try:
        with torch.inference_mode(), copied_once(inner):
            return model.generate(generation_config=settings, **inputs)
    finally:
        inner.generation_config = own


@dataclass(frozen=True)
class Ending:
    """What surrounds the text of an answer.

    Attributes:
        tokens: each of them ends an answer.
        text: an end mark that is no token.
        prompt: how a prompt ends behind which the template writes `before`.
        before: what it writes there and is no part of the answer (Qwen 3's empty thinking block).
    """

    tokens: frozenset[int]
    text: str = ""
    prompt: str = ""
    before: str = ""


def ending(model: Any, tokenizer: PreTrainedTokenizerBase) -> Ending:
    """What surrounds the answers of a model with the tokenizer's chat template."""
    with isolated_templates():
        form = answer_form(tokenizer)
    tokens = frozenset(_end_tokens(model, tokenizer.eos_token_id, form.end_token))
    return Ending(tokens, form.end_text, form.asked, form.plain_before)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """The ids that end an answer: the model's, the tokenizer's, and the chat template's.

    A base model's own end token often differs from the one its template closes a turn with, and
    the latter is what an adapter has learned to write. Where the template closes turns with
    ordinary text, no token is that (`Ending.text`).
    """
    if tokenizer is None:
        return _end_tokens(model)
    with isolated_templates():
        return _end_tokens(model, tokenizer.eos_token_id, answer_form(tokenizer).end_token)


def _end_tokens(model: Any, *others: Any) -> list[int]:
    settings = getattr(model, "generation_config", None)  # which an encoder lacks
    own = getattr(settings, "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or [])
    return list(dict.fromkeys([*ends, *(one for one in others if isinstance(one, int))]))


def stops_at(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_length: int,
    on_step: Callable[[bool, int], None],
) -> Any:
    """A stopping criterion for `generate`: a row ends when `text` stands in its answer.

    Args:
        text: an end mark that is no token; empty where there is none.
        prompt_length: columns of `input_ids` before the answers.
        on_step: called after each step, with whether all rows have ended, and with the number of
            tokens that the longest answers have.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    # Tokens that may hold the text, and some before, which a tokenizer may have merged with it.
    width = len(text.encode()) + 4

    class AtText(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            length = input_ids.shape[1]
            ended = [False] * len(input_ids)
            if text:
                tails = input_ids[:, max(prompt_length, length - width) :]
                ended = [text in written for written in tokenizer.batch_decode(tails)]
            on_step(all(ended), length - prompt_length)
            return torch.tensor(ended, device=input_ids.device)

    return StoppingCriteriaList([AtText()])
