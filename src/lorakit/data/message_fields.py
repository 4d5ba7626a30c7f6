"""Fields of messages that nothing reads: neither lorakit nor the chat template."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.data.checks import SHOWN, Finding
from lorakit.data.message_marks import MARKS
from lorakit.data.samples import Sample
from lorakit.data.spans import REASONING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is read, or looked for elsewhere (`unshown` tells where reasoning is left out).
_READ = {"role", "content", "tool_calls", "tool_call_id", *REASONING}


def findings_of_fields(
    samples: Sequence[Sample], tokenizer: "PreTrainedTokenizerBase", by_template: bool
) -> list[Finding]:
    """One for each field that holds something and is not read; none where all are.

    Args:
        by_template: whether messages become text by the chat template.
    """
    template = tokenizer.chat_template if by_template else ""
    words = set(re.findall(r"\w+", template if isinstance(template, str) else json.dumps(template)))
    places: dict[str, list[str]] = {}
    for sample in samples:
        fields = {
            key
            for message in sample.messages
            for key, value in message.items()
            if key not in _READ and value not in ("", [], {})
        }
        for field in fields - words:
            places.setdefault(field, []).append(sample.where)
    return [
        Finding(
            f"written with the message field '{field}', which nothing reads",
            len(where),
            len(samples),
            tuple(where[:SHOWN]),
            "only answers are learned: take the mark from the other messages"
            if field in MARKS
            else "it changes nothing: write what it says into 'content', or remove it",
        )
        for field, where in sorted(places.items())
    ]
