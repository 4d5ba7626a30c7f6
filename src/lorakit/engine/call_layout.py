"""How a chat template writes calls of functions, as a grammar that makes a model write them so.

Found by rendering calls with known names and arguments: what stands around the arguments is the
template's, and each function's JSON schema takes their place (`argument_layout.py` where they are
no JSON object). Reading calls is `data/tool_calls.py`'s work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.spans import find_answers
from lorakit.data.tool_calls import ToolCalls
from lorakit.engine.argument_layout import KEYS, VALUES, ArgumentLayout, argument_layout
from lorakit.engine.grammar import Grammar
from lorakit.engine.grammar_worker import WHITESPACE
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = ("probe_one", "probe_two")
_IDS = ("Aa1Bb2Cc3", "Dd4Ee5Ff6")
_ANY = {"type": "object"}


@dataclass(frozen=True)
class CallLayout:
    """What a template writes before, between and behind the arguments of calls.

    Attributes:
        before: the first function's arguments, from where its call begins.
        between: the arguments of one call and the next one's; None where one answer has one call.
        behind: the last one's arguments, without the mark that ends an answer.
        opened: what closes the reasoning that the prompt has opened; mostly nothing.
        tokens: ids of special tokens by their names.
        arguments: how arguments stand there that are no JSON object; None for JSON.
    """

    before: str
    between: str | None
    behind: str
    opened: str
    tokens: Mapping[str, int]
    arguments: ArgumentLayout | None = None

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        parallel: bool = True,
        instead: Grammar | None = None,
        optional: bool = False,
    ) -> Grammar:
        """Answers that call some of the functions, each with arguments that its schema accepts.

        Args:
            tools: `{type: function, function: {name, parameters}}`.
            parallel: whether there may be several calls.
            optional: whether there may be none: then any text, or an answer of `instead`'s form.
            instead: a JSON schema.

        Raises:
            InputError: arguments cannot be held to their schema in the template's form.
        """
        functions = [tool["function"] for tool in tools]
        several = parallel and self.between is not None
        rules = []
        for number, function in enumerate(functions):
            if self.arguments is not None:
                name = f"arguments_{number}"
                rules += self.arguments.rules(name, function, lambda text: self._lark(text, 0, ""))
                continue
            schema = {**(function.get("parameters") or _ANY)}
            schema["x-guidance"] = {"whitespace_pattern": WHITESPACE}
            rules.append(f"arguments_{number}: %json {json.dumps(schema)}")
        begin, before = self._trigger()
        lead = " ".join(self._lark(begin, 0, "")) if not optional or instead else "lead"
        first = self._calls("first", before, functions, 0)
        more = self._calls("more", self.between or "", functions, 1) if several else []
        behind = " ".join(self._lark(self.behind, 0, ""))
        calls = f"{lead} first {'more*' if several else ''} {behind}"
        rules += [*first, *more]
        if lead == "lead":
            special = begin in self.tokens
            lazy, end = ("", f"<[{self.tokens[begin]}]>") if special else ("[lazy]", _text(begin))
            rules += [r"TEXT: /(.|\n)*/", f"lead{lazy}: TEXT {end}"]
        if not optional:
            start = calls
        elif instead is not None:
            start = f"{calls} | instead"
            rules.append(f"instead: %json {instead.text}")
        else:
            start = f"{calls} | TEXT"
        if self.opened:
            rules += ["thought[lazy]: /(.|\\n)*/ " + _text(self.opened), "GAP: /\\s{0,4}/"]
            start = f"thought GAP ({start})"
        return Grammar("lark", "\n".join([f"start: {start}", *rules]))

    def _trigger(self) -> tuple[str, str]:
        """`before` in two parts; the first is what every call begins with."""
        for name in self.tokens:
            if self.before.startswith(name):
                return name, self.before[len(name) :]
        at = self.before.index(_NAMES[0])
        return self.before[:at], self.before[at:]

    def _calls(
        self, rule: str, piece: str, functions: Sequence[Mapping[str, Any]], which: int
    ) -> list[str]:
        """A rule with one case a function."""
        cases = [
            " ".join([*self._lark(piece, which, function["name"]), f"arguments_{number}"])
            for number, function in enumerate(functions)
        ]
        return [f"{rule}: {' | '.join(cases)}"]

    def _lark(self, piece: str, which: int, name: str) -> list[str]:
        """A piece of the template's text as Lark's terminals, with a function's name in it."""
        marks = [re.escape(one) for one in (*self.tokens, _NAMES[which], *_IDS)]
        found = []
        for part in re.split(f"({'|'.join(marks)})", piece):
            if part in self.tokens:
                found.append(f"<[{self.tokens[part]}]>")
            elif part == _NAMES[which]:
                found.append(_text(name))
            elif part in _IDS:
                found.append("/[a-zA-Z0-9]{9}/")
            elif part:
                found.append(_text(part))
        return found


def call_layout(tokenizer: PreTrainedTokenizerBase, calls: ToolCalls) -> CallLayout | None:
    """The layout of a chat template's calls; None where a grammar cannot have it.

    Args:
        calls: of the same tokenizer.
    """
    if calls.form is None:
        return None
    text = _written(tokenizer, 1)
    found = None if text is None else calls.form.opening.search(text)
    place = None if text is None else _arguments(text, 0)
    if text is None or found is None:
        return None
    if place is None or found.start() > place[0]:
        return _tagged_layout(tokenizer, calls)
    both = _written(tokenizer, 2)
    places = (None, None) if both is None else (_arguments(both, 0), _arguments(both, 1))
    between = None
    if both is not None and places[0] is not None and places[1] is not None:
        between = both[places[0][1] : places[1][0]]
    behind = _without_end(text[place[1] :], calls)
    before = text[found.start() : place[0]]
    if _NAMES[0] not in before:
        return None
    tokens = _tokens(tokenizer, calls, text + (both or ""))
    return CallLayout(before, between, behind, calls.answers.opened, tokens)


def _tagged_layout(tokenizer: PreTrainedTokenizerBase, calls: ToolCalls) -> CallLayout | None:
    """The layout of calls whose arguments are no JSON object."""
    opening = calls.form.opening if calls.form else None
    texts = dict(zip(KEYS, VALUES, strict=True))
    two = _written(tokenizer, 1, texts)
    number = _written(tokenizer, 1, {KEYS[0]: int(VALUES[0])})
    if two is None or number is None or opening is None or (found := opening.search(two)) is None:
        return None
    start = found.start()

    def units(text: str) -> list[str]:
        parts = re.split(f"({calls.answers.special.pattern})", text)
        return [one for n, part in enumerate(parts) for one in ([part] if n % 2 else part)]

    made = argument_layout(two[start:], number[start:], units)
    if made is None or _NAMES[0] not in made[0]:
        return None
    before, arguments, behind = made
    between, both = None, _written(tokenizer, 2, texts)
    if both is not None:
        # Behind the first call's arguments stands what ends them, and the second call's beginning.
        second = both[start + len(before) :].partition(VALUES[1])[2]
        lead, there, _ = second.partition(arguments.before + KEYS[0])
        lead = lead if arguments.raw else lead[1:]  # without the quote
        if there and lead.startswith(arguments.behind) and _NAMES[1] in lead:
            between = lead[len(arguments.behind) :]
    tokens = _tokens(tokenizer, calls, two + (both or ""))
    behind = _without_end(behind, calls)
    return CallLayout(before, between, behind, calls.answers.opened, tokens, arguments)


def _without_end(behind: str, calls: ToolCalls) -> str:
    """What stands behind the last call, without the mark that ends the answer."""
    end = calls.answers.end.strip()
    behind = behind.rstrip()
    return behind.removesuffix(end).rstrip() if end else behind


def _tokens(tokenizer: PreTrainedTokenizerBase, calls: ToolCalls, text: str) -> dict[str, int]:
    names = set(calls.answers.special.findall(text))
    return {name: int(tokenizer.convert_tokens_to_ids(name)) for name in names}


def _written(
    tokenizer: PreTrainedTokenizerBase, number: int, arguments: Mapping[str, Any] | None = None
) -> str | None:
    """What the template writes for so many calls; None where it refuses them."""
    made, tools = [], []
    for name, ident, value in list(zip(_NAMES, _IDS, VALUES, strict=True))[:number]:
        given = {"k": value} if arguments is None else arguments
        function = {"name": name, "arguments": given}
        made.append({"type": "function", "id": ident, "function": function})
        schema = {"type": "object", "properties": {key: {"type": "string"} for key in given}}
        described = {"name": name, "description": "d", "parameters": schema}
        tools.append({"type": "function", "function": described})
    asked = {"role": "user", "content": "a"}
    calling = {"role": "assistant", "content": "", "tool_calls": made}
    try:
        found = find_answers([asked, calling], tokenizer, tools)
    except InputError:
        return None
    start, end = found.spans[0]
    return found.text[start:end]


def _arguments(text: str, which: int) -> tuple[int, int] | None:
    """From where to where the arguments of a call stand; None where they are no JSON object."""
    value = text.find(VALUES[which])
    start, end = text.rfind("{", 0, max(value, 0)), text.find("}", value) + 1
    if min(value, start, end - 1) < 0:
        return None
    try:
        given = json.loads(text[start:end])
    except ValueError:
        return None
    return (start, end) if given == {"k": VALUES[which]} else None


def _text(text: str) -> str:
    return json.dumps(text)
