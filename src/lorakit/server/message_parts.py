"""An answer's text taken apart while it comes: reasoning, content, and calls of functions.

Text that may be the beginning of a mark is held back until that is known. A call whose name and
first brace are written is one, with the arguments as far as they were written, and what is no call
stays text. A message is the same whether it comes at once or piece by piece.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.call_stream import CallPiece
from lorakit.data.tool_calls import ToolCalls
from lorakit.server.replies import AddedArguments, AnswerCall, CallDelta, CalledFunction

_LONGEST_MARK = 40
_LETTERS = string.ascii_letters + string.digits
_BEGINS = re.compile(r"[<\[◁]")  # of any mark in front of reasoning or calls


@dataclass
class CallPart:
    """What was added to a call; its first part has the id and the name."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    ended: bool = False

    @property
    def whole(self) -> AnswerCall:
        """As OpenAI's replies have a call."""
        function: CalledFunction = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    @property
    def delta(self) -> CallDelta:
        """As OpenAI's streams have it."""
        if not self.id:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function: AddedArguments = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass
class Parts:
    """What was added to a message."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPart] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class MessageParts:
    """Takes one answer apart.

    Args:
        reads: the marks of the model's chat template.
        tools: the functions that the prompt showed; without any, nothing is a call.
        most: so many calls are kept.
        special: whether the names of special tokens stay in the text.

    Attributes:
        called: how many calls there were.
    """

    def __init__(
        self,
        reads: ToolCalls,
        tools: list[dict[str, Any]],
        most: int | None = None,
        *,
        special: bool = False,
    ) -> None:
        self._reads, self._tools, self._most, self._special = reads, tools, most, special
        self._form = reads.form if tools else None
        make = None if self._form is None else self._form.reader
        self._reader = None if make is None else make(tools)
        self._seen = 0  # characters of the calls that the reader has
        self._held = ""
        self._closing = reads.answers.opened  # of the reasoning that the text is in
        self._thought = bool(self._closing)
        self._at_start, self._in_calls, self._said = True, False, False
        self.called = 0

    def add(self, text: str, final: bool = False) -> Parts:
        """What is sure now that `text` has come; with `final` all that is left."""
        self._held += text
        parts = Parts()
        while self._step(parts, final):
            pass
        return parts

    def _step(self, parts: Parts, final: bool) -> bool:
        """Takes something off the held text; whether there may be more."""
        if self._closing:
            return self._think(parts, final)
        if self._at_start:
            return self._begin(parts, final)
        if self._in_calls:
            self._read_calls(parts, final)
            if final:
                self._call(parts)
            return False
        return self._say(parts, final)

    def _think(self, parts: Parts, final: bool) -> bool:
        before, found, rest = self._held.partition(self._closing)
        if not found and not final:
            sure = len(before[: len(before) - _overlap(before, self._closing)].rstrip())
            before, rest = before[:sure], before[sure:]
        if not self._said:
            before = before.lstrip()
        if found:
            before = before.rstrip()
        self._said |= bool(before)
        parts.reasoning += self._plain(before)
        self._held = rest
        if found:
            self._closing, self._said = "", False
        return bool(found)

    def _begin(self, parts: Parts, final: bool) -> bool:
        """Looks whether reasoning begins the answer."""
        text = self._held.lstrip()
        for opening, closing in self._reads.answers.reasoning:
            if text.startswith(opening):
                self._held, self._closing, self._thought = text[len(opening) :], closing, True
                return True
            if not final and (not text or opening.startswith(text)):
                return False
        self._at_start = False
        return True

    def _say(self, parts: Parts, final: bool) -> bool:
        text = self._held.lstrip() if self._thought and not self._said else self._held
        if self._form is not None:
            # Behind content that was given out is no beginning of an answer (`\A`).
            behind = "." if self._said else ""
            if (found := self._form.opening.search(behind + text, len(behind))) is not None:
                at = found.start() - len(behind)
                content, self._held = text[:at], text[at:]
                self._in_calls = True
                self._add(parts, content.rstrip())
                return True
            keep = 0 if final else self._doubtful(text)
        else:
            keep = 0
        content, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if self._form is not None and not final:  # whitespace in front of a call is no content
            bare = content.rstrip()
            content, self._held = bare, content[len(bare) :] + self._held
        self._add(parts, content)
        return False

    def _add(self, parts: Parts, content: str) -> None:
        content = self._plain(content)
        self._said |= bool(content)
        parts.content += content

    def _doubtful(self, text: str) -> int:
        """How many characters at the end may become the beginning of a call."""
        if not self._said and text[:1] in "{[" and len(text) < _LONGEST_MARK:
            return len(text)
        tail = text[-_LONGEST_MARK:]
        found = _BEGINS.search(tail)
        return 0 if found is None else len(tail) - found.start()

    def _read_calls(self, parts: Parts, final: bool) -> None:
        """Gives out what is sure of the calls."""
        if self._reader is None:
            return
        text, self._seen = self._held[self._seen :], len(self._held)
        for piece in (*self._reader.add(text), *(self._reader.end() if final else ())):
            if self._most is None or piece.index < self._most:
                self._give(parts, piece)

    def _give(self, parts: Parts, piece: CallPiece) -> None:
        if piece.name:
            made = "".join(secrets.choice(_LETTERS) for _ in range(9))  # Mistral's form
            parts.calls.append(CallPart(piece.index, made, piece.name))
            self.called += 1
        elif not parts.calls or parts.calls[-1].index != piece.index:
            parts.calls.append(CallPart(piece.index))
        parts.calls[-1].arguments += piece.arguments
        parts.calls[-1].ended = piece.ended

    def _call(self, parts: Parts) -> None:
        text, self._held = self._held, ""
        try:
            calls = [] if self._form is None else self._form.read(text, self._tools)
        except (ValueError, SyntaxError, RecursionError):
            calls = []
        if not calls and self._form is not None and self.called and self._reader is not None:
            # Behind the calls that were begun may be the beginning of another one.
            found = self._form.opening.search(self._reader.rest)
            text = "" if found is None else self._reader.rest[found.start() :]
        if not calls:
            self._add(parts, text)
            return
        for index, call in enumerate(calls[: self._most]):
            if index >= self.called:
                arguments = json.dumps(call.arguments, ensure_ascii=False)
                self._give(parts, CallPiece(index, call.name, arguments, ended=True))

    def _plain(self, text: str) -> str:
        return text if self._special else self._reads.answers.special.sub("", text)


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
