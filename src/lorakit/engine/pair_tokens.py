"""A text or a pair of texts to the tokens that a classifier reads, cut as a request asks for.

The tokenizer joins a pair by its own special tokens, and says which text each token is of
(`token_type_ids`); texts that are too long are cut by its own rule too, the longer one first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorakit.engine.bounded_tokens import (
    CHARACTERS_A_TOKEN,
    TooManyTokensError,
    tokenizing,
    tokens_within,
)
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Encoded:
    """What a model reads: its tokens, and which text each is of where the tokenizer says it."""

    tokens: list[int]
    types: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cut:
    """How texts are shortened.

    Attributes:
        whole: the most tokens of all texts with the special ones; None cuts nothing.
        each: the most tokens of each text alone; None for any number.
        side: which end is cut off; None is the tokenizer's own.
    """

    whole: int | None = None
    each: tuple[int | None, ...] = ()
    side: Side | None = None


def encoded(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int, cut: Cut
) -> Encoded:
    """One text or two as the model reads them.

    Args:
        limit: how many tokens there may be.

    Raises:
        TooManyTokensError: there are more, when they are cut.
        InputError: the tokenizer cannot read a text, or there is no room for one.
    """
    if cut.whole is None and sum(map(len, texts)) > limit * CHARACTERS_A_TOKEN:
        for text, most in zip(texts, cut.each or (None,) * len(texts), strict=True):
            if most is None:
                tokens_within(text, tokenizer, limit)
    special = tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
    if cut.whole is not None and cut.whole <= special:
        raise InputError(
            f"truncate_prompt_tokens is {cut.whole}, and {special} tokens are special ones: leave "
            "room for text"
        )
    with tokenizing():
        found = _in_parts(texts, tokenizer, special, cut) if any(cut.each) else None
        if found is None:
            with _cutting_at(tokenizer, cut.side):
                made = tokenizer(
                    *texts,
                    truncation="longest_first" if cut.whole is not None else False,
                    max_length=cut.whole,
                    verbose=False,
                )
            found = Encoded(list(made["input_ids"]), tuple(made.get("token_type_ids") or ()))
    if len(found.tokens) > limit:
        raise TooManyTokensError(len(found.tokens), limit, counted=True)
    return found


def _in_parts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: int, cut: Cut
) -> Encoded:
    """Texts of which some have a limit of their own, cut and then joined by the tokenizer."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("max_tokens_per_doc needs a tokenizer of the tokenizers library")
    backend.no_truncation()
    backend.no_padding()
    side = cut.side or tokenizer.truncation_side
    parts = [backend.encode(text, add_special_tokens=False) for text in texts]
    sizes = [
        len(part) if most is None else min(most, len(part))
        for part, most in zip(parts, cut.each, strict=True)
    ]
    if cut.whole is not None:
        sizes = _longest_first(sizes, cut.whole - special)
    for part, size in zip(parts, sizes, strict=True):
        part.truncate(size, direction=side)
    joined = backend.post_process(*parts, add_special_tokens=True)
    named = "token_type_ids" in tokenizer.model_input_names
    return Encoded(list(joined.ids), tuple(joined.type_ids) if named else ())


def _longest_first(sizes: Sequence[int], room: int) -> list[int]:
    """Sizes that are `room` together at most; the largest lose tokens first."""
    if len(sizes) == 1 or sum(sizes) <= room:
        return [min(size, room) for size in sizes]
    less = min(min(sizes), room // 2)
    found = [less if size == min(sizes) else room - less for size in sizes]
    return found if sizes[0] != sizes[1] else [room // 2, room - room // 2]


@contextmanager
def _cutting_at(tokenizer: Any, side: Side | None) -> Iterator[None]:
    own = tokenizer.truncation_side
    tokenizer.truncation_side = side or own
    try:
        yield
    finally:
        tokenizer.truncation_side = own
