"""Pairs and judged answers as tokens: two sequences with the same prompt, or one with its label.

Every answer behind the prompt is learned, with the token that ends it. Where rows are cut, a pair
of which an answer is gone or whose answers have become equal has no preference left (`supervised`
is 0), so that it is left out and counted as other rows that are too long.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorakit.data.judged_rows import JudgedSample
from lorakit.data.masking import IGNORE, RowGroup, TokenizedRow, tokenized
from lorakit.data.preference_rows import PairSample
from lorakit.data.samples import Sample
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PairRow(RowGroup):
    """The chosen and the rejected sequence of a pair, in this order.

    `margin` is by how much the chosen one is better, where the row says so.
    """

    margin: float | None = None

    @property
    def supervised(self) -> int:
        """Tokens of both answers; 0 where one has none or both are the same."""
        counts = [part.supervised for part in self.parts]
        different = self.parts[0].input_ids != self.parts[1].input_ids
        return sum(counts) if all(counts) and different else 0


@dataclass(frozen=True, slots=True)
class JudgedRow(TokenizedRow):
    """An answer to a prompt that is desirable or not.

    `mismatched` is the same prompt with the answer of another row (`with_mismatched`).
    """

    desirable: bool = True
    mismatched: TokenizedRow | None = None


def tokenize_pair(
    sample: PairSample, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> PairRow:
    """Both sequences of a pair, each cut to `max_length` tokens.

    Raises:
        InputError: the template cannot be masked, or writes both answers in the same way.
    """
    chosen, rejected = (tokenized(part, tokenizer, max_length) for part in sample.parts)
    row = replace(PairRow.of(chosen, rejected), margin=sample.margin)
    if not row.truncated and not row.supervised:
        raise InputError(
            f"{row.where}: the chosen and the rejected answer become the same tokens, so there is "
            "no preference to learn; drop the row"
        )
    return row


def tokenize_judged(
    sample: Sample, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TokenizedRow:
    """A judged answer; of a pair both, the chosen one as desirable and the rejected one not."""
    if isinstance(sample, PairSample):
        pair = tokenize_pair(sample, tokenizer, max_length)
        judged = (_judged(part, i == 0) for i, part in enumerate(pair.parts))
        return replace(PairRow.of(*judged), margin=pair.margin)
    assert isinstance(sample, JudgedSample)
    return _judged(tokenized(sample, tokenizer, max_length), sample.desirable)


def with_mismatched(rows: Sequence[TokenizedRow], max_length: int) -> list[TokenizedRow]:
    """Rows of judged answers, each with the answer of the nearest earlier one to another prompt.

    The first follows the last. Where all prompts are the same, it is the answer before.

    Args:
        max_length: the tokens to which prompt and answer are cut.
    """
    judged = [part for row in rows for part in row.sequences]
    prompts = [tuple(part.input_ids[: _begin(part)]) for part in judged]
    # Other pictures have the same tokens.
    asked = [(p, _sources(part)) for p, part in zip(prompts, judged, strict=True)]
    count = len(judged)
    found: list[JudgedRow] = []
    # Of a run of answers to the same prompt, all go back to the one before the run.
    other = next((i for i in range(count - 1, 0, -1) if asked[i] != asked[0]), count - 1)
    for i, part in enumerate(judged):
        if i and asked[i] != asked[i - 1]:
            other = i - 1
        answer = judged[other]
        begin = _begin(answer)
        ids = [*prompts[i], *answer.input_ids[begin:]][:max_length]
        labels = [*[IGNORE] * len(prompts[i]), *answer.labels[begin:]][:max_length]
        shown = part.pictures and part.pictures.within(len(prompts[i]))[0]
        assert isinstance(part, JudgedRow)
        mismatched = TokenizedRow(ids, labels, part.where, pictures=shown)
        found.append(replace(part, mismatched=mismatched))
    made: list[TokenizedRow] = []
    for row in rows:
        parts, found = found[: len(row.sequences)], found[len(row.sequences) :]
        made.append(replace(row, parts=tuple(parts)) if isinstance(row, PairRow) else parts[0])
    return made


def _judged(row: TokenizedRow, desirable: bool) -> JudgedRow:
    fields = {name: getattr(row, name) for name in TokenizedRow.__dataclass_fields__}
    return JudgedRow(**fields, desirable=desirable)


def _sources(row: TokenizedRow) -> tuple[str, ...]:
    """The pictures of a row."""
    return tuple(one.source for one in row.pictures.placed) if row.pictures else ()


def _begin(row: TokenizedRow) -> int:
    """Where the first token that is learned stands."""
    return next(i for i, token in enumerate(row.labels) if i and token != IGNORE)
