"""Samples with labels to token ids: a class for a whole row, or a tag at each word's first token.

What samples are is in `lorakit.data.labelled`; targets of decoders come from `seq2seq`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data.labelled import LabelledSample, label_name
from lorakit.data.masking import TokenizedRow
from lorakit.errors import InputError
from lorakit.models.loss import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LabelledRow(TokenizedRow):
    """A row ready for training: `labels` are one class, one a token (or `IGNORE`), or a target's.

    `segments` tell the two texts of a pair apart, for models that want it (`token_type_ids`).
    `words` are the places of the words whose tags are among the labels, `unseen` the number of
    words without a token.
    """

    segments: list[int] | None = None
    words: tuple[int, ...] = ()
    unseen: int = 0

    @property
    def supervised(self) -> int:
        """Labels that the loss is taken on."""
        return sum(label != IGNORE for label in self.labels)


def tokenize_sequence(
    sample: LabelledSample,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    number_of: Mapping[str, int],
) -> LabelledRow:
    """A text or a pair as the model reads it, and its class; the longer text is cut first."""
    encoded = tokenizer(*sample.texts, return_attention_mask=False, verbose=False)
    cut = max(0, len(encoded["input_ids"]) - max_length)
    if cut:
        encoded = tokenizer(
            *sample.texts, return_attention_mask=False, truncation=True, max_length=max_length
        )
    segments = encoded.get("token_type_ids")
    label = number_of[label_name(sample.labels[0])]
    ids = list(encoded["input_ids"])
    return LabelledRow(ids, [label], sample.where, cut, segments=segments)


def tokenize_words(
    sample: LabelledSample,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    number_of: Mapping[str, int],
) -> LabelledRow:
    """Words as the model reads them; a word's tag is that of its first token, others have none.

    Words stand as in a text, with a space between them where the tokenizer's tokens have it.

    Raises:
        InputError: no word has a token.
    """
    first, *others = sample.texts
    space = _space_between(tokenizer)
    words = [first, *(space + word for word in others)]
    options = {"is_split_into_words": True, "return_attention_mask": False}
    encoded = tokenizer(words, verbose=False, **options)
    whole = {word for word in encoded.word_ids() if word is not None}
    cut = max(0, len(encoded["input_ids"]) - max_length)
    if cut:
        encoded = tokenizer(words, truncation=True, max_length=max_length, **options)
    labels, seen = [], []
    before = None
    for word in encoded.word_ids():
        if word is None or word == before:
            labels.append(IGNORE)
        else:
            labels.append(number_of[label_name(sample.labels[word])])
            seen.append(word)
        before = word
    if not seen:
        raise InputError(
            f"{sample.where}: the tokenizer makes no token of any word; repair or drop the row"
        )
    return LabelledRow(
        list(encoded["input_ids"]),
        labels,
        sample.where,
        cut,
        segments=encoded.get("token_type_ids"),
        words=tuple(seen),
        unseen=len(words) - len(whole),
    )


def _space_between(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A space where a word that follows another has other tokens than a word alone, else nothing.

    A byte-level tokenizer writes the space into the token; given words, it would glue them.
    """
    alone = tokenizer.tokenize("b")
    return "" if tokenizer.tokenize("b b") == alone + alone else " "


def notice_unseen(rows: Sequence[LabelledRow]) -> list[str]:
    """How many words have no token, and where the first one is."""
    unseen = [row for row in rows if row.unseen]
    if not unseen:
        return []
    return [
        f"{sum(row.unseen for row in unseen):,} words have no token, so that their tags are "
        f"neither learned nor scored (first: {unseen[0].where})"
    ]
