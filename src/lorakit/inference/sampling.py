"""How the next token is chosen and where an answer ends, as transformers' `GenerationConfig`.

Models bring a generation configuration of their own, whose fields fill whatever is left unset.
Here every field that changes the answer is set, so the same call means the same on every model.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lorakit.data.formats import Sample
from lorakit.data.masking import IGNORE, tokenize
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generation_settings(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> GenerationConfig:
    """Settings for `model.generate` that end an answer at any of `end_tokens`.

    Args:
        max_new_tokens: at most so many tokens an answer, at least 1.
        temperature: what logits are divided by; 0 always takes the likeliest token.
        top_p: sample from the likeliest tokens that together reach this probability, in (0, 1].

    Raises:
        InputError: a value is out of its range.
    """
    from transformers import GenerationConfig

    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if temperature < 0:
        raise InputError(f"temperature must be 0 (no sampling) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, not {top_p}")
    sampled = temperature > 0
    ends = end_tokens(model, tokenizer)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        # Without sampling these three must be transformers' defaults, or it warns.
        temperature=float(temperature) if sampled else 1.0,
        top_p=float(top_p) if sampled else 1.0,
        top_k=0 if sampled else 50,
        typical_p=1.0,
        num_beams=1,
        min_length=0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=pad_token(tokenizer, ends),
    )


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the model's, the tokenizer's, and the chat template's.

    A base model's own end token often differs from the one its template closes a turn with, and
    the latter is what an adapter has learned to write.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or [])
    if isinstance(tokenizer.eos_token_id, int):
        ends.append(tokenizer.eos_token_id)
    with contextlib.suppress(InputError):  # a template that cannot be read: the others must do
        turn = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        learned = tokenize(Sample(turn, None, "the probe"), tokenizer, max_length=1 << 30).labels
        ends.append([label for label in learned if label != IGNORE][-1])
    return list(dict.fromkeys(ends))


def pad_token(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> int:
    """Any token may pad, since padding is masked; the tokenizer's own where it has one."""
    own = tokenizer.pad_token_id
    return own if isinstance(own, int) else (ends or [0])[0]
