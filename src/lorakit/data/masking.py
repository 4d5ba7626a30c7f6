"""One sample to token ids and labels: which tokens the loss is taken on, for any chat template.

Templates are programs, and few of them mark the assistant's part. So the spans are found from
outside, by rendering: what precedes an answer is what the template gives with
`add_generation_prompt`, and what follows it is what stays behind a placeholder put in its place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lorakit.data.formats import Message, Sample
from lorakit.data.templates import render
from lorakit.errors import InputError
from lorakit.models.loss import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A row ready for training; `labels[t]` is `input_ids[t]` or `IGNORE`, unshifted.

    `cut` tokens were behind the largest length and are gone.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    cut: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def truncated(self) -> bool:
        """Whether the row was longer."""
        return self.cut > 0

    @property
    def supervised(self) -> int:
        """Tokens that the loss is taken on; a causal model never predicts the first one."""
        return sum(label != IGNORE for label in self.labels[1:])


def tokenize(sample: Sample, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> TokenizedRow:
    """Tokens and labels of `sample`, cut from the right to `max_length` tokens.

    Of a conversation every answer is learned, with the token that ends it, and nothing else is.
    Of plain text everything is learned, with the end-of-sequence token.

    Raises:
        InputError: the template refuses the conversation or cannot be masked, no token is left
            to learn, or the tokenizer lacks offsets or an end-of-sequence token.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets; use the fast tokenizer"
        )
    if sample.text is not None:
        ids, labels = _tokenize_text(sample.text, tokenizer)
    else:
        try:
            ids, labels = _tokenize_conversation(sample.messages, tokenizer)
        except InputError as error:
            raise InputError(f"{sample.where}: {error}") from error
    labels[0] = IGNORE
    cut = max(0, len(ids) - max_length)
    row = TokenizedRow(ids[:max_length], labels[:max_length], sample.where, cut)
    if row.supervised == 0:
        first = next((i for i, label in enumerate(labels) if label != IGNORE), None)
        if first is None:
            raise InputError(f"{sample.where}: no token to learn; give it an answer or drop it")
        raise InputError(
            f"{sample.where}: the answer begins at token {first + 1} of {len(ids)}, behind "
            f"data.max_length {max_length}; raise it to {len(ids)} or shorten the row"
        )
    return row


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token, so no answer could end")
    return int(tokenizer.eos_token_id)


def _tokenize_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if ids[-1:] != [_eos(tokenizer)]:
        ids.append(_eos(tokenizer))
    return ids, list(ids)


def _tokenize_conversation(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    # What follows the last answer cannot be learned from, and would only cost time.
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    messages = messages[: last + 1]
    text, spans, ended = answer_spans(messages, tokenizer)
    encoded = tokenizer(
        text,
        add_special_tokens=False,  # the template has written them
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # no warning about long texts: they are cut and counted here
    )
    ids = list(encoded["input_ids"])
    labels = [IGNORE] * len(ids)
    token = 0
    for start, end in spans:
        # A token belongs to the span it begins in: one that begins before the answer is the
        # prompt's, and an end token may swallow the newline behind it (Phi-3's `<|end|>`).
        while token < len(ids) and encoded["offset_mapping"][token][0] < end:
            if encoded["offset_mapping"][token][0] >= start:
                labels[token] = ids[token]
            token += 1
    if not ended:
        ids.append(_eos(tokenizer))
        labels.append(_eos(tokenizer))
    return ids, labels


def answer_spans(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, list[Span], bool]:
    """The rendered conversation, and the characters `[start, end)` of it that are learned.

    `messages` ends with an answer. Each span runs from where the model starts to write through
    the special token that ends the turn; whitespace behind that token is left out. The third
    value tells whether the last answer has such a token; if not, the text ends with the answer.

    Raises:
        InputError: the template refuses the conversation, or writes no answer where it is.
    """
    full = render(messages, tokenizer)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    bodies = [_body(messages, i, full, tokenizer) for i in turns]
    behind = full[bodies[-1][1] :]
    special = _special_tokens(tokenizer, len(tokenizer)).search(behind)
    closing = behind[: special.end()] if special else behind.rstrip()
    spans = [
        # Some templates close only the last turn.
        (start, end + len(closing) if full.startswith(closing, end) else end)
        for start, end in bodies
    ]
    if special is None:
        full = full[: spans[-1][1]]
    return full, spans, special is not None


def _body(
    messages: Sequence[Message], turn: int, full: str, tokenizer: "PreTrainedTokenizerBase"
) -> Span:
    """From where the model starts to write message `turn` to the end of its content in `full`."""
    mark = "7310582946"  # digits survive upper-casing, trimming and JSON quoting
    while mark in full:
        mark += mark[-3]
    marked = render(
        [*messages[:turn], {**messages[turn], "content": mark}, *messages[turn + 1 :]], tokenizer
    )
    before, found, after = marked.partition(mark)
    end = len(full) - len(after)
    start = _opening_length(messages[:turn], full, tokenizer)
    if start is None and full.startswith(before):
        # The template writes this turn differently when it is history (it drops the reasoning,
        # say), so the place of the content is all there is to go by.
        start = len(before)
    if not found or start is None or start > end or not full.endswith(after):
        raise InputError(
            f"the chat template cannot be masked: it does not show where message {turn + 1}, "
            "an answer, stands in the text; use another template or tokenizer"
        )
    return start, end


def _opening_length(
    before: Sequence[Message], full: str, tokenizer: "PreTrainedTokenizerBase"
) -> int | None:
    """Length of the text a model would be asked to continue, if `full` begins with it."""
    try:
        opening = render(before, tokenizer, add_generation_prompt=True)
    except InputError:  # many templates refuse a conversation without messages
        return None
    return len(opening) if full.startswith(opening) else None


@lru_cache(maxsize=2)
def _special_tokens(tokenizer: "PreTrainedTokenizerBase", size: int) -> re.Pattern[str]:
    """Matches any special token; `size` renews it when tokens were added."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    # Without special tokens nothing may match, the empty string least of all.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
