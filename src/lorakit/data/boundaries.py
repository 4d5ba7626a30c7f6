"""Tokens that never lie across the place where an answer begins.

A model that answers reads the tokens of the prompt alone, and writes its own behind them. Tokenised
as one text, the last character of a prompt and the first of its answer may share a token (`\\n` and
`\\n\\n`, `assistant:` and a space), which generation never sees. Such texts are tokenised in two.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text's tokens: their ids, and the characters that they start and end at.

    `apart`: it was tokenised in parts, as one text would have joined a prompt and its answer.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]
    apart: bool = False


def encode_texts(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", add_special_tokens: bool = False
) -> list[Encoded]:
    """Each text's tokens."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # no warning about long texts: they are cut and counted elsewhere
    )
    return [
        Encoded(list(ids), [start for start, _ in offsets], [end for _, end in offsets])
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def encode_apart(
    texts: Sequence[str], beginnings: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Each text's tokens, of which none lies across one of its `beginnings`.

    Where the tokens before a beginning are those of that text alone, as almost always, the text is
    tokenised as one.

    Args:
        texts: rendered conversations, with their special tokens.
        beginnings: of each text, the characters at which answers begin, in order.
    """
    encoded = encode_texts(texts, tokenizer)
    places = [sorted(set(some)) for some in beginnings]
    asked = [
        [_asking(text, own, at, tokenizer) for at in some]
        for text, own, some in zip(texts, encoded, places, strict=True)
    ]
    # Behind a special token nothing before it counts, so there are few of these.
    different = list({text for several in asked for _, text in several})
    alone = dict(zip(different, (e.ids for e in encode_texts(different, tokenizer)), strict=True))
    found = []
    for text, own, some, several in zip(texts, encoded, places, asked, strict=True):
        if all(
            _is_as_alone(own, first, at, alone[asking])
            for at, (first, asking) in zip(some, several, strict=True)
        ):
            found.append(own)
        else:
            found.append(_in_parts(text, some, tokenizer))
    return found


def _asking(
    text: str, encoded: Encoded, at: int, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, str]:
    """The text before `at` from the last special token on, and the number of its first token."""
    special = _special_ids(tokenizer, len(tokenizer))
    first = bisect_left(encoded.starts, at)
    while first > 0:
        first -= 1
        if encoded.ids[first] in special:
            return first, text[encoded.starts[first] : at]
    return 0, text[:at]


@lru_cache(maxsize=2)
def _special_ids(tokenizer: "PreTrainedTokenizerBase", size: int) -> frozenset[int]:
    """Of added tokens that split a text; `size` renews them when tokens were added."""
    added = tokenizer.added_tokens_decoder
    return frozenset(number for number, token in added.items() if token.special)


def _is_as_alone(encoded: Encoded, first: int, at: int, alone: Sequence[int]) -> bool:
    """Whether the tokens from `first` to the character `at` are those of that text alone."""
    behind = bisect_left(encoded.starts, at)
    return encoded.ids[first:behind] == alone and (behind == 0 or encoded.ends[behind - 1] <= at)


def _in_parts(text: str, places: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    ids: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    for begin, end in zip((0, *places), (*places, len(text)), strict=True):
        part = text[begin:end]
        encoded = _continued(part, tokenizer) if begin else encode_texts([part], tokenizer)[0]
        ids += encoded.ids
        # Some tokenizers leave the space at a token's beginning out of its place.
        last = max(begin, end - 1)
        starts += [min(begin + start, last) for start in encoded.starts]
        ends += [min(begin + stop, end) for stop in encoded.ends]
    return Encoded(ids, starts, ends, apart=True)


_ANCHORS = (":", "\n", "a", ".")


def _continued(text: str, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """The tokens of a text that goes on behind another.

    Tokenizers that mark where a text begins (SentencePiece's `▁`) are shown an anchor before it,
    whose own tokens are taken away again.
    """
    if _marks_beginnings(tokenizer, len(tokenizer)):
        for anchor in _ANCHORS:
            size = len(anchor)
            whole, head = encode_texts([anchor + text, anchor], tokenizer)
            at = len(head.ids)
            if _is_as_alone(whole, 0, size, head.ids):
                return Encoded(
                    whole.ids[at:], _moved(whole.starts[at:], size), _moved(whole.ends[at:], size)
                )
    return encode_texts([text], tokenizer)[0]


def _moved(places: Iterable[int], by: int) -> list[int]:
    return [place - by for place in places]


@lru_cache(maxsize=2)
def _marks_beginnings(tokenizer: "PreTrainedTokenizerBase", size: int) -> bool:
    """Whether a text has other tokens than it has behind a line break."""
    alone, behind = encode_texts(["b", "\nb"], tokenizer)
    return behind.ids[-len(alone.ids) :] != alone.ids
