"""What a row teaches (`Sample`), and what a form of rows is (`RowFormat`).

Which answers of a conversation are learned, and how strongly, is told by the marks that other
tools write on messages: OpenAI's fine-tuning format and the older Axolotl have `weight`, Axolotl
`train` and `training`, ms-swift `loss` and `loss_scale`.
The forms themselves are in `supervised_rows` and `labelled`, and registered in `formats`.
How a conversation becomes text is the template's business (`lorakit.data.templates`).
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorakit.data.conversations import (
    IMAGE,
    Message,
    check_conversation,
    pictures_of,
    string,
    tools,
)
from lorakit.data.picture_columns import with_pictures
from lorakit.data.sources import Row
from lorakit.errors import InputError

MARKS = ("weight", "train", "training", "loss", "loss_scale")
"""Keys of a message whose value is true or 1 (learned), false or 0 (only read)."""

WEIGHTS = ("weight", "loss_scale")
"""Those of them that may be any number from 0 on, by which the loss of an answer is scaled."""

PARTIAL_MARKS = ("train_detail", "training_detail")
"""Axolotl's masks of parts of a message, which are refused."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one row teaches: a conversation (`messages`), or plain `text` and no messages.

    `tools` are the descriptions of functions that a template shows to the model. `copies` is how
    often an epoch sees the sample. `unlearned` are the positions of answers that are only read,
    `weights` pairs of a position and what the loss of its answer is scaled by, where that is not 1.
    The last `completion` messages are the row's completion; 0 where it does not tell them apart.
    `columns` are those of the row, under the file's own names, where something reads them later.
    """

    messages: tuple[Message, ...]
    text: str | None
    where: str
    tools: tuple[dict[str, Any], ...] = ()
    copies: int = 1
    unlearned: frozenset[int] = frozenset()
    weights: tuple[tuple[int, float], ...] = ()
    completion: int = 0
    columns: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def learned(self) -> list[int]:
        """The positions of the answers that are learned, in order."""
        return [
            i
            for i, message in enumerate(self.messages)
            if message["role"] == "assistant" and i not in self.unlearned
        ]

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last answer that is learned; none for plain text."""
        return list(self.messages[: self._last_answer])

    @property
    def reference(self) -> str:
        """The last answer that is learned; empty for plain text.

        The calls of an answer stand in it as JSON `{"name": ..., "arguments": {...}}`, one a line,
        behind the text if there is any: that is what most templates make of them, but for the
        tags around it.
        """
        if not self.messages:
            return ""
        answer = self.messages[self._last_answer]
        calls = [
            {key: call["function"][key] for key in ("name", "arguments")}
            for call in answer.get("tool_calls", ())
        ]
        lines = [answer["content"], *(json.dumps(call, ensure_ascii=False) for call in calls)]
        return "\n".join(lines if answer["content"] or not calls else lines[1:])

    @property
    def prompt_key(self) -> str:
        """Equal for samples that ask the same with the same tools; for plain text, the text."""
        if self.text is not None:
            return self.text
        asked = [_keyed(self.prompt), *([self.tools] if self.tools else [])]
        return json.dumps(asked, sort_keys=True, ensure_ascii=False)

    @property
    def pictures(self) -> list[str]:
        """The pictures of all messages up to the last answer that is learned, in order."""
        return [p for m in self.messages[: self._last_answer] for p in pictures_of(m["content"])]

    @property
    def marked(self) -> bool:
        """Whether an answer is marked as not learned."""
        return bool(self.unlearned)

    @property
    def content_key(self) -> tuple[str, ...]:
        """Equal for samples that teach the same."""
        return self.prompt_key, self.reference

    @property
    def parts(self) -> "tuple[Sample, ...]":
        """The conversations or texts that it consists of."""
        return (self,)

    @property
    def _last_answer(self) -> int:
        return max(self.learned, default=0)


def _keyed(messages: Sequence[Message]) -> list[Message]:
    """The messages with hashes in the place of pictures that stand in them whole."""
    if not any(pictures_of(message["content"]) for message in messages):
        return list(messages)
    return [
        {**message, "content": [_key(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _key(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != IMAGE or len(part[IMAGE]) < 4096:
        return part
    return {**part, IMAGE: hashlib.sha256(part[IMAGE].encode()).hexdigest()}


def take_marks(row: Row, messages: Sequence[Message]) -> tuple[list[Message], frozenset[int]]:
    """`marks_of` rows whose answers are learned or not, and nothing in between."""
    cleaned, unlearned, weights = marks_of(row, messages)
    if weights:
        raise row.error(refused_weight(weights[0]))
    return cleaned, unlearned


def refused_weight(weight: tuple[int, float]) -> str:
    """What is wrong with a weight, a position and a number, where answers cannot have one."""
    at, value = weight
    return (
        f"message {at + 1} has the weight {value:g}; here an answer is learned (1) or not (0), as "
        "other weights are for objective sft: round it, or give its source a weight in data.train"
    )


def marks_of(
    row: Row, messages: Sequence[Message]
) -> tuple[list[Message], frozenset[int], tuple[tuple[int, float], ...]]:
    """The messages without their marks, and what these say.

    Returns: the messages; the positions of the answers that are not learned; and those of answers
    whose weight is another one than 1, each with it.

    A mark that asks to learn a message other than an answer stays where it is, so that it counts
    as a field that nothing reads.

    Raises:
        InputError: a mark has another value, two of them disagree, or part of a message is masked.
    """
    unlearned: set[int] = set()
    weights: list[tuple[int, float]] = []
    cleaned = []
    for i, message in enumerate(messages):
        marks = {key: _weight(row, message, i, key) for key in MARKS if key in message}
        for key in PARTIAL_MARKS:
            if message.get(key):
                raise row.error(
                    f"message {i + 1} has '{key}', which masks parts of a message; "
                    "lorakit learns an answer whole or not at all: mark it with train: false, or "
                    "remove the key"
                )
        given = ", ".join(f"{key}: {message[key]}" for key in marks)
        if len({weight > 0 for weight in marks.values()}) > 1:
            raise row.error(
                f"message {i + 1} is marked as learned and as not learned ({given}); remove one"
            )
        numbers = {weight for key, weight in marks.items() if key in WEIGHTS}
        if len(numbers) > 1:
            raise row.error(f"message {i + 1} has two weights ({given}); remove one")
        answer = message["role"] == "assistant"
        if answer and 0 in marks.values():
            unlearned.add(i)
        elif answer and numbers - {1}:
            weights.append((i, max(numbers)))
        taken = {key for key, weight in marks.items() if answer or not weight}
        cleaned.append({k: v for k, v in message.items() if k not in taken})
    return cleaned, frozenset(unlearned), tuple(weights)


def _weight(row: Row, message: Message, position: int, key: str) -> float:
    value: Any = message[key]
    number = isinstance(value, (bool, int, float))
    if number and (value in (0, 1) or (key in WEIGHTS and value > 0 and math.isfinite(value))):
        return float(value)
    wanted = "a number from 0 on" if key in WEIGHTS else "true or false, 1 or 0"
    raise InputError(
        f"{row.where}: '{key}' of message {position + 1} is {str(value)[:40]!r}; expected {wanted}"
    )


def system_message(row: Row) -> list[Message]:
    """The message in the optional `system` column; null and empty mean that there is none."""
    value = row.values.get("system")
    if value is None or value == "":
        return []
    return [{"role": "system", "content": string(row, value, "'system'")}]


@dataclass(frozen=True)
class RowFormat:
    """A form of rows: the columns that tell it, and how one is read.

    Attributes:
        required, optional: its columns.
        read: the messages of a row's conversation, the text of plain text, or the sample itself
            of a kind that only some objectives take.
        kind: what is learned from it: `conversation`, `text`, or TRL's word for another type of
            data set, such as `preference`. Objectives name the kinds that they take.
        propose: a `data.columns` for rows whose columns have other names and may mean this form;
            None where they do not.
        completed: how many messages of a row are its completion, as in `Sample`.
    """

    required: tuple[str, ...]
    read: Callable[[Row], Any]
    optional: tuple[str, ...] = ("system", "tools")
    kind: str = "conversation"
    propose: Callable[[Mapping[str, object]], dict[str, str] | None] = lambda values: None
    completed: Callable[[Row], int] = lambda row: 0

    @property
    def label(self) -> str:
        """Its name in messages, such as `prompt+completion`."""
        return "+".join(self.required)

    @cached_property
    def columns(self) -> frozenset[str]:
        """All columns that it reads."""
        return frozenset({*self.required, *self.optional})

    def sample(self, row: Row, asks: bool = False) -> Any:
        """The sample in a row of this form: a `Sample`, or the own one of another kind.

        Args:
            asks: a conversation that ends before an answer is a prompt, and its answer empty.

        Raises:
            InputError: a value cannot be used.
        """
        found = self.read(row)
        if self.kind == "text":
            with_pictures(row, ())
            return Sample((), found, row.where)
        if self.kind != "conversation":
            return found
        if asks and found and found[-1]["role"] != "assistant":
            found = [*found, {"role": "assistant", "content": ""}]
        found = with_pictures(row, [*system_message(row), *found])
        messages, unlearned, weights = marks_of(row, found)
        check_conversation(row, messages)
        sample = Sample(
            tuple(messages),
            None,
            row.where,
            tools(row),
            unlearned=unlearned,
            weights=weights,
            completion=self.completed(row),
        )
        if not sample.learned:
            raise row.error(
                "every answer is marked as not learned, so there is nothing to learn; drop the row"
            )
        return sample
