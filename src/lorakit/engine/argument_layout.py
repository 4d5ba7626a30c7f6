"""How a chat template writes arguments of calls that are no JSON object, as rules of a grammar.

Tags around keys and values (GLM 4.5, Qwen3-Coder) and keywords of Python (Llama 4): what stands
before a key, between key and value and behind the value is found by rendering calls with two
arguments and with a number. `call_layout.py` puts these rules into calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from keyword import iskeyword
from typing import Any

from lorakit.data.call_values import resolved
from lorakit.engine.grammar_worker import WHITESPACE
from lorakit.errors import InputError

KEYS, VALUES = ("key_one", "key_two"), ("5283917406", "9047261538")
"""The arguments of calls that are rendered; a value is text or the number that it reads as."""

_SAID = {"title", "description", "default", "examples", "deprecated", "readOnly", "$comment"}
_OF_OBJECT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_OF_TEXT = {"type", "pattern", "minLength", "maxLength"}
_DEEPEST = 8
_Lark = Callable[[str], list[str]]


@dataclass(frozen=True)
class ArgumentLayout:
    """What stands around each argument of a call.

    Attributes:
        before: a key.
        between: a key and its value.
        behind: a value.
        separator: two arguments.
        raw: whether texts stand there as they are, without quotes.
        tags: what no such text holds, as it would end there for who reads the call.
    """

    before: str
    between: str
    behind: str
    separator: str
    raw: bool
    tags: tuple[str, ...] = ()

    def rules(self, name: str, function: Mapping[str, Any], lark: _Lark) -> list[str]:
        """The rule `name` for the arguments of a function, and those that it needs.

        Arguments stand in the order of the schema's properties; those not required may be missing.

        Args:
            lark: makes terminals of a text, the special tokens in it among them.

        Raises:
            InputError: the schema says what these rules cannot.
        """
        schema = function.get("parameters") or {}
        if unknown := {*schema} - _OF_OBJECT - _SAID - {"$schema", "strict"}:
            raise InputError(
                f"{function['name']}: {min(unknown)!r} of its parameters cannot be enforced in the "
                "form in which this chat template writes calls: leave it out"
            )
        if not self.raw and not _is_python(function["name"]):
            raise InputError(f"{function['name']!r} is no name of a function in Python")
        required = set(schema.get("required") or ())
        made: list[str] = []
        properties = list((schema.get("properties") or {}).items())
        for number, (key, given) in enumerate(properties):
            if re.search(r"[<>\n]", key) or not (self.raw or _is_python(key)):
                raise InputError(f"{function['name']}: an argument cannot be called {key!r} here")
            own = f"{name}_{number}"
            value = _Values(f"{own}_v", self, lark, schema)
            cases = value.cases(given, f"{function['name']}.{key}")
            opening = " ".join([*lark(self.before), *lark(key), *lark(self.between)])
            made += [*value.rules, f"{own}: {opening} ({' | '.join(cases)})"]
        # After the first argument a separator stands before each.
        separator = " ".join(lark(self.separator))
        for which, before in (("f", ""), ("m", separator)):
            for number, (key, _) in enumerate(properties):
                more = f"{before} {name}_{number} {name}_m{number + 1}"
                less = "" if key in required else f" | {name}_{which}{number + 1}"
                made.append(f"{name}_{which}{number}: {more}{less}")
            made.append(f'{name}_{which}{len(properties)}: ""')
        return [f"{name}: {name}_f0", *made]


class _Values:
    """The cases of one value, each with what stands behind it."""

    def __init__(
        self, name: str, layout: ArgumentLayout, lark: _Lark, root: Mapping[str, Any]
    ) -> None:
        self._name, self._lark, self._root = name, lark, root
        self._behind, self._raw, self._tags = layout.behind, layout.raw, layout.tags
        self.rules: list[str] = []

    def cases(self, schema: Any, where: str, depth: int = 0) -> list[str]:
        """Alternatives for a value of the schema.

        Raises:
            InputError: a text has a constraint that a raw text cannot be held to.
        """
        schema = resolved(schema, self._root)
        if not isinstance(schema, dict) or depth > _DEEPEST:
            raise InputError(f"{where}: its schema cannot be enforced in this template's calls")
        if not self._raw:
            return [self._json(schema)]
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return [self._literal(one) for one in values]
        for name in ("anyOf", "oneOf"):
            if name in schema and {*schema} <= {name} | _SAID:
                return [case for one in schema[name] for case in self.cases(one, where, depth + 1)]
        kinds = schema.get("type")
        if isinstance(kinds, list):
            parts = [{**schema, "type": kind} for kind in kinds]
            return [case for one in parts for case in self.cases(one, where, depth + 1)]
        if kinds == "string" or {*schema} <= _SAID:
            if unknown := {*schema} - _OF_TEXT - _SAID:
                raise InputError(
                    f"{where}: {min(unknown)!r} of a text cannot be enforced in the form in which "
                    "this chat template writes calls: use pattern, enum, minLength or maxLength"
                )
            return [self._text(schema)]
        return [self._json(schema)]

    def _json(self, schema: Mapping[str, Any]) -> str:
        defs = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        own = {**schema, **defs, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        rule = f"{self._name}{len(self.rules)}"
        self.rules.append(f"{rule}: %json {json.dumps(own)}")
        return " ".join([rule, *self._lark(self._behind)])

    def _literal(self, given: Any) -> str:
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        return " ".join([*self._lark(text), *self._lark(self._behind)])

    def _text(self, schema: Mapping[str, Any]) -> str:
        """A raw text as one terminal with the mark behind it, which it cannot hold."""
        parts = []
        if (pattern := schema.get("pattern")) is not None:
            begin, end = pattern.startswith("^"), re.search(r"(?<!\\)\$\Z", pattern)
            inner = pattern[begin : len(pattern) - 1 if end else None]
            parts.append(f"{'' if begin else _ANY}(?:{inner}){'' if end else _ANY}")
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        if least or most != "":
            parts.append(f"(?s:.{{{least},{most}}})")
        whole = " & ".join(f"/{_slashed(one)}/" for one in parts or [_ANY])
        if self._tags:
            tags = "|".join(_slashed(_escaped(tag)) for tag in self._tags)
            whole += f" & ~/{_ANY}({tags}){_ANY}/"
        # What ends the value is one token in some tokenizers; a terminal holds no such token.
        mark, *rest = self._lark(self._behind)
        rule = f"{self._name.upper()}{len(self.rules)}"
        if mark.startswith('"'):
            self.rules.append(f"{rule}: ({whole}) {mark}")
            return " ".join([rule, *rest])
        self.rules.append(f"{rule}: {whole}")
        return " ".join([rule, mark, *rest])


_ANY = "(?s:.*)"


def argument_layout(
    two: str, number: str, units: Callable[[str], Sequence[str]]
) -> tuple[str, ArgumentLayout, str] | None:
    """The layout of arguments, and what stands before and behind all of them.

    Args:
        two: a call with both keys and their values as texts.
        number: with the first key alone, its value a number.
        units: what a text is made of and is not cut in: special tokens, and characters.

    Returns: None where arguments cannot be written so.
    """
    parts = _split(two, KEYS[0], VALUES[0], KEYS[1], VALUES[1])
    single = _split(number, KEYS[0], VALUES[0])
    if parts is None or single is None:
        return None
    head, between, middle, _, tail = parts
    raw = single[1] == between
    if not raw:
        quote = between[-1:]
        quoted = quote in ("'", '"') and middle.startswith(quote) and tail.startswith(quote)
        if not quoted or single[1] != between[:-1]:
            return None
        between, middle, tail = between[:-1], middle[1:], tail[1:]
    behind = "".join(_common(units(middle), units(tail)))
    rest = middle[len(behind) :]
    before = "".join(_common(units(head)[::-1], units(rest)[::-1])[::-1])
    separator = rest[: len(rest) - len(before)]
    opening, ending = head[: len(head) - len(before)], tail[len(behind) :]
    tags = tuple(sorted(set(re.findall(r"</?\w+[>=]", two)))) if raw else ()
    return opening, ArgumentLayout(before, between, behind, separator, raw, tags), ending


def _split(text: str, *marks: str) -> list[str] | None:
    """What stands around the marks, which come in their order; None where they do not."""
    found = []
    for mark in marks:
        part, there, text = text.partition(mark)
        if not there:
            return None
        found.append(part)
    return [*found, text]


def _common(a: Sequence[str], b: Sequence[str]) -> list[str]:
    pairs = zip(a, b, strict=False)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _is_python(name: str) -> bool:
    return name.isidentifier() and not iskeyword(name)


def _escaped(text: str) -> str:
    return re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", text).replace("\n", "\\n")


def _slashed(expression: str) -> str:
    """An expression as it stands between slashes in Lark."""
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", expression)
