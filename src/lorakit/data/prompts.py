"""Conversations that wait for an answer: rows of the files that training reads, or plain lines."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.console import piped_text
from lorakit.data.conversations import Message, tools
from lorakit.data.formats import recognise
from lorakit.data.picture_columns import with_pictures
from lorakit.data.prompt_rows import asked_messages
from lorakit.data.samples import system_message, take_marks
from lorakit.data.sources import Row, read_rows
from lorakit.errors import InputError

_ANSWERS = ("completion", "response")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to the answer, the functions that a template shows, and where it stands."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    where: str

    def opened_by(self, system: str | None) -> "Prompt":
        """With a system message, if there is none yet."""
        if system is None or self.messages[0]["role"] == "system":
            return self
        opening: Message = {"role": "system", "content": system}
        return replace(self, messages=(opening, *self.messages))


def read_prompts(path: str, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """All prompts of a source, in order.

    Args:
        path: a text file (`.txt`), or `-` for the standard input, with a prompt a line; or data as
            for training (`read_source`), whose rows may have a `prompt` alone, or a conversation
            that ends with the user's turn. An answer that a row has at its end is left out.
        columns: as for `recognise`.

    Raises:
        InputError: there is nothing to read, or a row asks nothing.
    """
    if path == "-":
        return _of_lines(piped_text().splitlines(), "standard input")
    if path.lower().endswith(".txt"):
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as text: {error}") from error
        return _of_lines(text.splitlines(), path)
    return [_prompt(row, columns or {}) for row in read_rows(path)]


def _of_lines(lines: Iterable[str], name: str) -> list[Prompt]:
    prompts = [
        Prompt(({"role": "user", "content": text},), (), f"{name}:{number}")
        for number, line in enumerate(lines, start=1)
        if (text := line.strip())
    ]
    if not prompts:
        raise InputError(f"{name} has no prompt: every line is empty")
    return prompts


def _prompt(row: Row, columns: Mapping[str, str]) -> Prompt:
    messages, _ = take_marks(row, _asked(row, columns))
    if not messages:
        raise row.error("no message is left to answer; add a user message")
    return Prompt(tuple(messages), tools(row), row.where)


def _asked(row: Row, columns: Mapping[str, str]) -> list[Message]:
    if not columns and "prompt" in row.values and not row.values.keys() & set(_ANSWERS):
        return _without_answer(asked_messages(row))
    form, row = recognise(row, columns)
    if form.kind != "conversation":
        raise row.error("plain text has no prompt; give the column 'prompt'")
    asked = [*system_message(row), *form.read(row)]
    return _without_answer(with_pictures(row, asked))


def _without_answer(messages: list[Message]) -> list[Message]:
    """The messages before the assistant's turn at the end, if there is one."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]
