"""What stands in texts and is not seen when one reads them: control characters, special tokens.

A tokenizer reads the name of a special token as the token itself, wherever it stands. In a
message that is an injection: the text of a row decides where the model sees a turn begin or end.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lorakit.data.formats import Sample
from lorakit.data.mixing import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# C0 without tab and the two line ends, DEL, and C1. NUL never gets here: it is refused.
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def notices_of_texts(samples: Sequence[Sample], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """One line for each thing found, with its count and the first row.

    Special tokens are looked for in messages alone: plain text is often written with them.
    """
    special = _special_tokens(tokenizer)
    notices = []
    if found := _found(samples, _CONTROL.search):
        where, character = found[0]
        notices.append(
            f"{_share(found, samples)} with control characters, which are learned as they are "
            f"(first: {where}, {character!a}): remove them unless they are meant"
        )
    conversations = [sample for sample in samples if sample.messages]
    if special and (found := _found(conversations, special.search)):
        where, token = found[0]
        notices.append(
            f"{_share(found, samples)} with the name of a special token in a message, which the "
            f"model takes for the token (first: {where}, {token!r}): remove it unless it is meant"
        )
    return notices


def _found(
    samples: Sequence[Sample], search: Callable[[str], "re.Match[str] | None"]
) -> list[tuple[str, str]]:
    """Of each sample that holds a match, its place and the first match."""
    found = []
    for sample in samples:
        match = next(filter(None, map(search, _texts(sample))), None)
        if match:
            found.append((sample.where, match.group()))
    return found


def _texts(sample: Sample) -> Iterator[str]:
    if sample.text is not None:
        yield sample.text
    for message in sample.messages:
        yield from _strings([value for key, value in message.items() if key != "role"])
    yield from _strings(sample.tools)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> "re.Pattern[str] | None":
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(names)))) if names else None


def _share(some: Sequence[object], of: Sequence[object]) -> str:
    return f"{len(some):,} of {count(len(of), 'row')} {'is' if len(some) == 1 else 'are'}"
