"""Text to tokens up to a limit: a text that is far too long is not tokenized to its end.

What a text costs before it is refused then depends on how many tokens the model reads, and not on
how long the text is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorakit.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_A_TOKEN = 8
"""More than tokens have on average in the text of any language or program."""
_LEAST = 4096


class TooManyTokensError(InputError):
    """A text has more tokens than there may be.

    Attributes:
        tokens: how many it has.
        counted: whether that is exact; else there are more than so many.
    """

    def __init__(self, tokens: int, limit: int, counted: bool) -> None:
        self.tokens, self.counted = tokens, counted
        amount = f"{tokens}" if counted else f"more than {tokens}"
        super().__init__(f"the text has {amount} tokens, and at most {limit} are read: shorten it")


@contextmanager
def tokenizing() -> Iterator[None]:
    """Within this block, whatever a tokenizer fails with is an InputError."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of Rust's tokenizers are no Exception
        kind = type(error).__name__
        raise InputError(
            f"the tokenizer cannot read this text: {kind}: {first_line(error)}"
        ) from error


def tokens_within(
    text: str, tokenizer: PreTrainedTokenizerBase, limit: int, add_special_tokens: bool = False
) -> list[int]:
    """The token ids of `text`, at most `limit` of them.

    A text of more than 8 characters a token is counted piece by piece first. Counts differ a little
    where pieces meet, so only a count well above `limit` is relied on.

    Raises:
        TooManyTokensError: there are more.
        InputError: the tokenizer cannot read the text.
    """

    def tokens(part: str) -> list[int]:
        with tokenizing():
            made = tokenizer(part, add_special_tokens=add_special_tokens, verbose=False)
        return list(made["input_ids"])

    size = max(limit * CHARACTERS_A_TOKEN, _LEAST)
    if len(text) > size:
        sure, counted = limit + limit // 2 + 64, 0
        for start in range(0, len(text), size):
            counted += len(tokens(text[start : start + size]))
            if counted > sure:
                raise TooManyTokensError(limit, limit, counted=False)
    found = tokens(text)
    if len(found) > limit:
        raise TooManyTokensError(len(found), limit, counted=True)
    return found
