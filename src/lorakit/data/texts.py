"""What rows hold and is not seen when one reads them: control characters, special tokens, fields
of messages that neither lorakit nor the chat template reads.

A tokenizer reads the name of a special token as the token itself, wherever it stands. In a
message that is an injection: the text of a row decides where the model sees a turn begin or end.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lorakit.data.conversations import IMAGE
from lorakit.data.findings import Finding, finding
from lorakit.data.samples import MARKS, Sample
from lorakit.data.spans import REASONING
from lorakit.data.templates import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# C0 without tab and the two line ends, DEL, and C1. NUL never gets here: it is refused.
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

# What pandas and Python write for a value that is not there.
_MISSING = re.compile(r"\s*(nan|NaN|None|null|NULL|<NA>|NaT)\s*")

# What is read, or looked for elsewhere (`unshown` tells where reasoning is left out).
_READ_FIELDS = {"role", "content", "tool_calls", "tool_call_id", *REASONING}


def findings_of_texts(
    samples: Sequence[Sample], tokenizer: "PreTrainedTokenizerBase"
) -> list[Finding]:
    """Everything that is looked for, each with its count, which may be 0 (but for `nan` and such).

    Special tokens are looked for in messages alone: plain text is often written with them.
    """
    special = special_tokens(tokenizer)
    conversations = [sample for sample in samples if sample.messages]
    found = [
        (
            "written with control characters",
            _found(samples, _CONTROL.search),
            "they are learned as they are: remove {} unless it is meant",
        ),
        (
            "written with the name of a special token",
            _found(conversations, special.search),
            "the model takes {} for the token: remove it unless that is meant",
        ),
    ]
    if missing := _found(samples, _MISSING.fullmatch):
        found.append(
            (
                "written with a text that an export made of a missing value",
                missing,
                "{} is learned as text: leave such values empty unless it is meant",
            )
        )
    return [
        finding(
            what,
            [sample for sample, _ in matches],
            len(samples),
            cure.format(ascii(matches[0][1]) if matches else "it"),
        )
        for what, matches, cure in found
    ]


def findings_of_fields(
    samples: Sequence[Sample], tokenizer: "PreTrainedTokenizerBase", by_template: bool
) -> list[Finding]:
    """One for each field that holds something and is not read; none where all are.

    Args:
        by_template: whether messages become text by the chat template.
    """
    template = tokenizer.chat_template if by_template else ""
    words = set(re.findall(r"\w+", template if isinstance(template, str) else json.dumps(template)))
    having: dict[str, list[Sample]] = {}
    for sample in samples:
        fields = {
            key
            for part in sample.parts
            for message in part.messages
            for key, value in message.items()
            if key not in _READ_FIELDS and value not in ("", [], {})
        }
        for field in fields - words:
            having.setdefault(field, []).append(sample)
    return [
        finding(
            f"written with the message field '{field}', which nothing reads",
            those,
            len(samples),
            "only answers are learned: take the mark from the other messages"
            if field in MARKS
            else "it changes nothing: write what it says into 'content', or remove it",
        )
        for field, those in sorted(having.items())
    ]


def _found(
    samples: Sequence[Sample], search: Callable[[str], "re.Match[str] | None"]
) -> list[tuple[Sample, str]]:
    """Each sample that holds a match, and the first match."""
    found = []
    for sample in samples:
        match = next(filter(None, map(search, _texts(sample))), None)
        if match:
            found.append((sample, match.group()))
    return found


def _texts(sample: Sample) -> Iterator[str]:
    if sample.text is not None:
        yield sample.text
    for message in (message for part in sample.parts for message in part.messages):
        yield from _strings([value for key, value in message.items() if key != "role"])
    yield from _strings(sample.tools)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and value.get("type") == IMAGE:
        return  # its name is no text that is learned
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)
