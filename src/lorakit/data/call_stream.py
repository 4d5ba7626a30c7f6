"""Calls of functions while they are written: names and arguments as far as they are sure.

A reader takes in the text of calls piece by piece and says what it adds to which call, as OpenAI's
streams do: the arguments' pieces, put together, are JSON. What a reader does not recognise it
leaves, and the whole text is read when it is at its end (`tool_calls.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import regex

from lorakit.data.call_values import ANYTHING, Expected, Tools, properties_of, value


@dataclass(frozen=True)
class CallPiece:
    """What is added to a call.

    Attributes:
        index: which call it is, from 0.
        name: of the function, in a call's first piece alone.
        arguments: some more of their JSON.
        ended: whether that is all of it.
    """

    index: int
    name: str = ""
    arguments: str = ""
    ended: bool = False


class CallReader(Protocol):
    """Reads the calls of one answer."""

    rest: str
    """The text behind what was given out."""

    def add(self, text: str) -> list[CallPiece]:
        """What is sure now that `text` has come."""
        ...

    def end(self) -> list[CallPiece]:
        """What is sure besides once nothing more comes."""
        ...


MakeReader = Callable[[Tools], CallReader]


def json_calls(begin: str, mark: str) -> MakeReader:
    """A reader of calls whose arguments are JSON objects.

    Args:
        begin: an expression for a call up to its arguments, with the group `name`, or `quoted` for
            a name in quotes.
        mark: for what every call has once before its arguments, those too that `begin` does not
            match; the first of these ends the reading.
    """
    pattern, marks = re.compile(begin + r"\s*(?=\{)"), re.compile(mark)
    return lambda tools: _JsonCalls(pattern, marks, tools)


@dataclass(frozen=True)
class TaggedForm:
    """Calls whose arguments stand between tags, as plain text.

    Attributes:
        begin: an expression for a call up to its arguments, with the group `name`.
        parameter: for what stands before a value, with the group `key`.
        close: the tag behind a value; a line's end that it begins with may be missing.
        end: the tag behind the last one.
        following: for what ends a value whose closing tag is missing: the next parameter, with its
            name in the group `key` where it has one there, or the call's end.
        closed: whether the last call must have its end.
    """

    begin: str
    parameter: str
    close: str
    end: str
    following: str
    closed: bool = True

    def __call__(self, tools: Tools) -> CallReader:
        """A reader of such calls of these functions."""
        return _TaggedCalls(self, tools, _names(tools))

    def read(self, text: str, tools: Tools) -> list[tuple[str, str]]:
        """Name and arguments, as JSON, of the calls in a text, of whatever functions."""
        reader = _TaggedCalls(self, tools, None)
        pieces = [*reader.add(text), *reader.end()]
        names, written, ended = dict[int, str](), dict[int, str](), set[int]()
        for piece in pieces:
            names.setdefault(piece.index, piece.name)
            written[piece.index] = written.get(piece.index, "") + piece.arguments
            if piece.ended:
                ended.add(piece.index)
        return [(name, written[index]) for index, name in names.items() if index in ended]


class _JsonCalls:
    def __init__(self, begin: re.Pattern[str], mark: re.Pattern[str], tools: Tools) -> None:
        self._begin, self._mark, self._names = begin, mark, _names(tools)
        self.rest = ""
        self._index, self._inside, self._lost = -1, False, False
        self._depth, self._quoted, self._escaped = 0, False, False

    def add(self, text: str) -> list[CallPiece]:
        self.rest += text
        pieces: list[CallPiece] = []
        while self.rest and not self._lost:
            if self._inside:
                pieces.append(self._argument())
                continue
            found = self._begin.search(self.rest)
            if found is None:
                break
            name = _name(found)
            skipped = len(self._mark.findall(self.rest, 0, found.end())) > 1
            if skipped or name not in self._names:
                self._lost = True
                break
            self._index, self._inside = self._index + 1, True
            self.rest = self.rest[found.end() :]
            pieces.append(CallPiece(self._index, name))
        return pieces

    def end(self) -> list[CallPiece]:
        return []

    def _argument(self) -> CallPiece:
        """The arguments as far as they have come, or to their end."""
        for at, character in enumerate(self.rest):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._inside, self._depth = False, 0
                    text, self.rest = self.rest[: at + 1], self.rest[at + 1 :]
                    return CallPiece(self._index, arguments=text, ended=True)
        text, self.rest = self.rest, ""
        return CallPiece(self._index, arguments=text)


class _TaggedCalls:
    def __init__(self, form: TaggedForm, tools: Tools, names: set[str] | None) -> None:
        self._begin, self._end, self._closed = re.compile(form.begin), form.end, form.closed
        self._parameter = re.compile(form.parameter, re.DOTALL)
        self._following = regex.compile(form.following)  # which knows what may still become one
        self._close, self._line = form.close.lstrip("\n"), form.close.startswith("\n")
        self._tools, self._names = tools, names
        self.rest = ""
        self._index, self._lost = -1, False
        self._kinds: dict[str, Expected] | None = None  # of the call that is open
        self._value: Expected | None = None  # of the value that is open
        self._given: set[str] = set()  # names of the call's arguments
        self._begun = False  # whether some of a text was given out

    def add(self, text: str) -> list[CallPiece]:
        self.rest += text
        pieces: list[CallPiece] = []
        while not self._lost and (found := self._step()) is not None:
            pieces.append(found)
        return pieces

    def end(self) -> list[CallPiece]:
        between = self._kinds is not None and self._value is None
        return self.add(self._end) if between and not self._closed else []

    def _step(self) -> CallPiece | None:
        """Reads on; None where more text is needed."""
        if self._value is not None:
            return self._in_value(self._value)
        if self._kinds is not None:
            return self._in_call(self._kinds)
        if (found := self._begin.search(self.rest)) is None:
            return None
        name = found["name"].strip()
        if self._names is not None and name not in self._names:
            self._lost = True
            return None
        self._kinds, self._given = properties_of(name, self._tools), set()
        self._index, self.rest = self._index + 1, self.rest[found.end() :]
        return CallPiece(self._index, name, "{")

    def _in_call(self, kinds: dict[str, Expected]) -> CallPiece | None:
        found, end = self._parameter.search(self.rest), self.rest.find(self._end)
        if found is not None and not 0 <= end < found.start():
            key = found["key"].strip()
            self._value, self._begun = kinds.get(key, ANYTHING), False
            comma = ", " if self._given else ""
            self.rest = self.rest[found.end() :]
            self._given.add(key)
            return CallPiece(self._index, arguments=f"{comma}{_quoted(key)}: ")
        if end < 0:
            return None
        self.rest, self._kinds = self.rest[end + len(self._end) :], None
        return CallPiece(self._index, arguments="}", ended=True)

    def _in_value(self, wanted: Expected) -> CallPiece | None:
        at, behind = self._end_of_value()
        if at >= 0:
            text = self.rest[:at]
            self.rest, self._value = self.rest[behind:], None
            if wanted.is_text:
                opening = "" if self._begun else '"'
                return CallPiece(self._index, arguments=opening + _inside(text) + '"')
            made = json.dumps(value(text, wanted), ensure_ascii=False)
            return CallPiece(self._index, arguments=made)
        if not wanted.is_text or not (sure := self._sure()):
            return None
        opening, self._begun = "" if self._begun else '"', True
        text, self.rest = self.rest[:sure], self.rest[sure:]
        return CallPiece(self._index, arguments=opening + _inside(text))

    def _end_of_value(self) -> tuple[int, int]:
        """Where the open value ends, and where the text behind it begins; -1 for not yet."""
        at, kinds = self.rest.find(self._close), self._kinds or {}
        for found in self._following.finditer(self.rest):
            key = (found.groupdict().get("key") or "").strip()
            if 0 <= at < found.start():
                break
            # A line of the value that only looks like a parameter names none of the function's.
            if not key or (key not in self._given and (not kinds or key in kinds)):
                return found.start(), found.start()
        if at < 0:
            return -1, -1
        text = self.rest[:at].removesuffix("\n" if self._line else "")
        return len(text), at + len(self._close)

    def _sure(self) -> int:
        """How many characters are of the value, whatever follows."""
        text = self.rest
        ends = [m.start() for m in self._following.finditer(text, partial=True) if m.partial]
        for start in (f"\n{self._close}", self._close)[not self._line :]:
            longest = min(len(text), len(start) - 1)
            found = next((n for n in range(longest, 0, -1) if text.endswith(start[:n])), 0)
            ends.append(len(text) - found)
        return min(ends)


def _name(found: re.Match[str]) -> str | None:
    """The name of a call; None where its quotes hold no JSON."""
    groups = found.groupdict()
    if not (quoted := groups.get("quoted")):
        return (groups.get("name") or "").strip()
    try:
        return str(json.loads(quoted))
    except ValueError:
        return None


def _names(tools: Tools) -> set[str]:
    return {tool.get("function", tool).get("name", "") for tool in tools}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _inside(text: str) -> str:
    """A text as it stands between the quotes of JSON."""
    return _quoted(text)[1:-1]
