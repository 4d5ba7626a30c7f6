"""Samples to token ids and labels: which tokens the loss is taken on.

A sample is first read as text with the spans to learn (`read`; where a template puts the answers
is found in `lorakit.data.spans`), many are tokenized at once (`encode`, faster than one by one),
and each is labelled (`label`). `tokenize` does all of it for one.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Self

from lorakit.data.boundaries import Encoded, encode_apart, encode_texts
from lorakit.data.picture_rows import RowPictures, expanded, placed
from lorakit.data.samples import Sample
from lorakit.data.spans import Answers, find_answers
from lorakit.errors import InputError
from lorakit.models.loss import IGNORE
from lorakit.models.picture_reader import reader_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODE_AT_ONCE = 256
"""Rows: enough to keep every core busy, and few enough that their offsets take little memory."""


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A row ready for training; `labels[t]` is `input_ids[t]` or `IGNORE`, unshifted.

    `cut` tokens were behind the largest length and are gone. `unshown` names what the chat
    template left out, as in `lorakit.data.spans.Answers`. `apart` tells that it was tokenised in
    parts, as in `lorakit.data.boundaries.Encoded`. `pictures` are those that stand in the tokens.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    cut: int = 0
    unshown: tuple[str, ...] = ()
    apart: bool = False
    pictures: RowPictures | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def truncated(self) -> bool:
        """Whether the row was longer."""
        return self.cut > 0

    @property
    def longest(self) -> int:
        """Tokens of the row before it was cut; of several sequences, of the longest."""
        return max(len(one) + one.cut for one in self.sequences)

    @property
    def supervised(self) -> int:
        """Tokens that the loss is taken on; a causal model never predicts the first one."""
        return sum(label != IGNORE for label in self.labels[1:])

    @property
    def sequences(self) -> "tuple[TokenizedRow, ...]":
        """What stands in a batch for the row: itself, or the parts of a `RowGroup`."""
        return (self,)


@dataclass(frozen=True, slots=True)
class RowGroup(TokenizedRow):
    """Sequences that are learned together, such as two answers to one prompt.

    `input_ids` and `labels` are those of all `parts`, one after the other.
    """

    parts: tuple[TokenizedRow, ...] = ()

    @classmethod
    def of(cls, *parts: TokenizedRow) -> Self:
        """The group of `parts`, of one sample."""
        return cls(
            [token for part in parts for token in part.input_ids],
            [label for part in parts for label in part.labels],
            parts[0].where,
            sum(part.cut for part in parts),
            tuple(dict.fromkeys(name for part in parts for name in part.unshown)),
            any(part.apart for part in parts),
            parts=parts,
        )

    @property
    def supervised(self) -> int:
        """Tokens that the loss is taken on; 0 where a part has none."""
        counts = [part.supervised for part in self.parts]
        return sum(counts) if all(counts) else 0

    @property
    def sequences(self) -> tuple[TokenizedRow, ...]:
        """The parts."""
        return self.parts


@dataclass(frozen=True, slots=True)
class RowWithSecond(TokenizedRow):
    """A row, and `second`: another one that is read beside it in a pass of its own.

    `second` has as many supervised tokens, and they are the same ones.
    """

    second: TokenizedRow = TokenizedRow([], [], "")

    @classmethod
    def of(cls, row: TokenizedRow, second: TokenizedRow) -> "RowWithSecond":
        """`row` with `second` beside it."""
        facts = (row.where, row.cut, row.unshown, row.apart, row.pictures)
        return cls(row.input_ids, row.labels, *facts, second)


@dataclass(frozen=True, slots=True)
class WeightedRow(TokenizedRow):
    """A row with tokens whose loss is scaled: [begin, end) and the factor, for each stretch."""

    weights: tuple[tuple[int, int, float], ...] = ()


def sequences_of(rows: Iterable[TokenizedRow]) -> list[TokenizedRow]:
    """The sequences of all rows, in order."""
    return [sequence for row in rows for sequence in row.sequences]


@dataclass(frozen=True, slots=True)
class Reading:
    """A sample as text: a conversation with its answers found, or plain text (`answers` None).

    `weights` has what the loss of each of its answers is scaled by; none where that is 1 for all.
    `sources` are its pictures, and `places` the characters of each; `text` has their tokens in it.
    """

    where: str
    text: str
    answers: Answers | None
    weights: tuple[float, ...] = ()
    sources: tuple[str, ...] = ()
    places: tuple[tuple[int, int], ...] = ()


def tokenize(sample: Sample, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> TokenizedRow:
    """Tokens and labels of `sample`, cut from the right to `max_length` tokens.

    Of a conversation every answer is learned, with the token that ends it, and nothing else is.
    Of plain text everything is learned, with the end-of-sequence token.

    Raises:
        InputError: the template refuses the conversation or cannot be masked, no token is left
            to learn, or the tokenizer lacks offsets or an end-of-sequence token.
    """
    row = tokenized(sample, tokenizer, max_length)
    if row.supervised == 0:
        whole = tokenized(sample, tokenizer, len(row) + row.cut)
        first = next(i for i, token in enumerate(whole.labels) if token != IGNORE)
        raise InputError(
            f"{row.where}: the answer begins at token {first + 1} of {len(whole)}, beyond "
            f"data.max_length {max_length}; raise it to {len(whole)} or shorten the row"
        )
    return row


def tokenized(
    sample: Sample, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TokenizedRow:
    """As `tokenize`; there may be nothing to learn before the cut."""
    reading = read(sample, tokenizer)
    return label(reading, next(encode([reading], tokenizer)), tokenizer, max_length)


def read(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> Reading:
    """The text of `sample` and what of it is learned.

    Raises:
        InputError: as `lorakit.data.spans.find_answers`, with the row named.
    """
    if sample.text is not None:
        return Reading(sample.where, sample.text, None)
    # What follows the last learned answer cannot be learned from, and would only cost time.
    messages = sample.messages[: sample.learned[-1] + 1]
    try:
        answers = find_answers(messages, tokenizer, sample.tools, sample.unlearned)
    except InputError as error:
        raise InputError(f"{sample.where}: {error}") from error
    scaled = dict(sample.weights)
    weights = tuple(scaled.get(i, 1.0) for i in sample.learned) if scaled else ()
    reading = Reading(sample.where, answers.text, answers, weights)
    if not (sources := sample.pictures):
        return reading
    found = expanded(answers.text, sources, tokenizer, sample.where)
    spans = [(found.moved(start), found.moved(end)) for start, end in answers.spans]
    return replace(
        reading,
        text=found.text,
        answers=replace(answers, text=found.text, spans=spans),
        sources=tuple(sources),
        places=tuple(found.places),
    )


def encode(readings: Sequence[Reading], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Encoded]:
    """Each reading's tokens, in order.

    Raises:
        InputError: the tokenizer cannot tell which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets; use the fast tokenizer"
        )
    for i in range(0, len(readings), ENCODE_AT_ONCE):
        several = readings[i : i + ENCODE_AT_ONCE]
        for plain_text, group in groupby(several, key=lambda reading: reading.answers is None):
            some = list(group)
            texts = [reading.text for reading in some]
            if plain_text:
                yield from encode_texts(texts, tokenizer, add_special_tokens=True)
            else:
                starts = [[start for start, _ in r.answers.spans] for r in some if r.answers]
                yield from encode_apart(texts, starts, tokenizer)


def label(
    reading: Reading, encoded: Encoded, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TokenizedRow:
    """The tokens of `reading` with those to learn labelled, cut to `max_length`.

    What is left may have no token to learn (`supervised` is 0).

    Raises:
        InputError: there is no token to learn, or an end-of-sequence token is needed.
    """
    ids = list(encoded.ids)
    labels = [IGNORE] * len(ids)
    answers = reading.answers
    stretches: list[slice] = []
    if answers is None:
        labels = list(ids)
    else:
        # A token belongs to the span it begins in: an end token may swallow the newline behind
        # it (Phi-3's `<|end|>`).
        for start, end in answers.spans:
            learned = slice(bisect_left(encoded.starts, start), bisect_left(encoded.starts, end))
            labels[learned] = ids[learned]
            stretches.append(learned)
    if not (answers.ended if answers else ids[-1:] == [end_token(tokenizer)]):
        ids.append(end_token(tokenizer))
        labels.append(end_token(tokenizer))
    labels[0] = IGNORE
    if all(token == IGNORE for token in labels):
        raise InputError(f"{reading.where}: no token to learn; give it an answer or drop it")
    pictures, kept = None, min(max_length, len(ids))
    if reading.sources and (reader := reader_of(tokenizer)):
        there = placed(reading.sources, reading.places, encoded.starts)
        pictures, kept = RowPictures(there, reader).within(kept, reading.where)
    row = TokenizedRow(
        ids[:kept],
        labels[:kept],
        reading.where,
        len(ids) - kept,
        answers.unshown if answers else (),
        encoded.apart,
        pictures,
    )
    if not reading.weights:
        return row
    ends = [stretch.stop for stretch in stretches[:-1]] + [len(ids)]  # with a mark that was added
    weights = [
        (stretch.start, end, weight)
        for stretch, end, weight in zip(stretches, ends, reading.weights, strict=True)
        if weight != 1
    ]
    facts = (row.where, row.cut, row.unshown, row.apart, row.pictures)
    return WeightedRow(row.input_ids, row.labels, *facts, tuple(weights))


def end_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id of the end-of-sequence token. Raises InputError where there is none."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token, so no answer could end")
    return int(tokenizer.eos_token_id)
