"""Which answers of a conversation are learned, by the marks that other tools write on messages.

OpenAI's fine-tuning format and the older Axolotl have `weight`, Axolotl `train` and `training`,
ms-swift `loss` and `loss_scale`. Which tokens an answer has is decided in `lorakit.data.masking`.
"""

from collections.abc import Sequence
from typing import Any

from lorakit.data.conversations import Message
from lorakit.data.sources import Row
from lorakit.errors import InputError

MARKS = ("weight", "train", "training", "loss", "loss_scale")
"""Keys of a message whose value is true or 1 (learned), false or 0 (only read)."""

PARTIAL_MARKS = ("train_detail", "training_detail")
"""Axolotl's masks of parts of a message, which are refused."""


def take_marks(row: Row, messages: Sequence[Message]) -> tuple[list[Message], frozenset[int]]:
    """The messages without their marks, and the positions of the answers that are not learned.

    A mark that asks to learn a message other than an answer stays where it is, so that it counts
    as a field that nothing reads.

    Raises:
        InputError: a mark has another value, two of them disagree, or part of a message is masked.
    """
    unlearned, cleaned = set(), []
    for i, message in enumerate(messages):
        marks = {key: _learned(row, message, i, key) for key in MARKS if key in message}
        for key in PARTIAL_MARKS:
            if message.get(key):
                raise InputError(
                    f"{row.where}: message {i + 1} has '{key}', which masks parts of a message; "
                    "lorakit learns an answer whole or not at all: mark it with train: false, or "
                    "remove the key"
                )
        if len(set(marks.values())) > 1:
            raise InputError(
                f"{row.where}: message {i + 1} is marked as learned and as not learned "
                f"({', '.join(f'{key}: {message[key]}' for key in marks)}); remove one"
            )
        answer = message["role"] == "assistant"
        if answer and False in marks.values():
            unlearned.add(i)
        taken = {key for key, learned in marks.items() if answer or not learned}
        cleaned.append({k: v for k, v in message.items() if k not in taken})
    return cleaned, frozenset(unlearned)


def _learned(row: Row, message: Message, position: int, key: str) -> bool:
    value: Any = message[key]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    what = f"{row.where}: '{key}' of message {position + 1} is {str(value)[:40]!r}"
    if isinstance(value, (int, float)):
        raise InputError(
            f"{what}; an answer is learned (1) or not (0), and nothing between or above: round "
            "it, or give its source a weight in data.train"
        )
    raise InputError(f"{what}; expected true or false, 1 or 0")
