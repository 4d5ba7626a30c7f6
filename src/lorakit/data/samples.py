"""What a row teaches (`Sample`), and what a form of rows is (`RowFormat`).

The forms themselves are in `chat_rows`, `pair_rows` and `text_rows`, and registered in `formats`.
How a conversation becomes text is the template's business (`lorakit.data.templates`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorakit.data.conversations import Message, check_conversation, string, tools
from lorakit.data.message_marks import take_marks
from lorakit.data.sources import Row
from lorakit.errors import InputError


@dataclass(frozen=True, slots=True)
class Sample:
    """What one row teaches: a conversation (`messages`), or plain `text` and no messages.

    `tools` are the descriptions of functions that a template shows to the model. `copies` is how
    often an epoch sees the sample. `unlearned` are the positions of answers that are only read.
    """

    messages: tuple[Message, ...]
    text: str | None
    where: str
    tools: tuple[dict[str, Any], ...] = ()
    copies: int = 1
    unlearned: frozenset[int] = frozenset()

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
        asked = [self.prompt, *([self.tools] if self.tools else [])]
        return json.dumps(asked, sort_keys=True, ensure_ascii=False)

    @property
    def _last_answer(self) -> int:
        return max(self.learned, default=0)


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
    """

    required: tuple[str, ...]
    read: Callable[[Row], Any]
    optional: tuple[str, ...] = ("system", "tools")
    kind: str = "conversation"
    propose: Callable[[Mapping[str, object]], dict[str, str] | None] = lambda values: None

    @property
    def label(self) -> str:
        """Its name in messages, such as `prompt+completion`."""
        return "+".join(self.required)

    @cached_property
    def columns(self) -> frozenset[str]:
        """All columns that it reads."""
        return frozenset({*self.required, *self.optional})

    def sample(self, row: Row) -> Any:
        """The sample in a row of this form: a `Sample`, or the own one of another kind.

        Raises:
            InputError: a value cannot be used.
        """
        found = self.read(row)
        if self.kind == "text":
            return Sample((), found, row.where)
        if self.kind != "conversation":
            return found
        messages, unlearned = take_marks(row, [*system_message(row), *found])
        check_conversation(row, messages)
        sample = Sample(tuple(messages), None, row.where, tools(row), unlearned=unlearned)
        if not sample.learned:
            raise InputError(
                f"{row.where}: every answer is marked as not learned, so there is nothing to "
                "learn; drop the row"
            )
        return sample
