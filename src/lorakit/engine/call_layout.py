"""How a chat template writes calls of functions, as a grammar that makes a model write them so.

Found by rendering calls with known names and arguments: what stands around the arguments is the
template's, and each function's JSON schema takes their place. Templates that write arguments as
anything but a JSON object have no layout. Reading calls is `data/tool_calls.py`'s work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.spans import find_answers
from lorakit.data.tool_calls import ToolCalls
from lorakit.engine.grammar import Grammar
from lorakit.engine.grammar_worker import WHITESPACE
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = ("probe_one", "probe_two")
_IDS = ("Aa1Bb2Cc3", "Dd4Ee5Ff6")
_VALUES = ("5283917406", "9047261538")
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
    """

    before: str
    between: str | None
    behind: str
    opened: str
    tokens: Mapping[str, int]

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
        """
        functions = [tool["function"] for tool in tools]
        several = parallel and self.between is not None
        rules = []
        for number, function in enumerate(functions):
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
    if text is None or found is None or place is None or found.start() > place[0]:
        return None
    both = _written(tokenizer, 2)
    places = (None, None) if both is None else (_arguments(both, 0), _arguments(both, 1))
    between = None
    if both is not None and places[0] is not None and places[1] is not None:
        between = both[places[0][1] : places[1][0]]
    behind = text[place[1] :]
    end = calls.answers.end
    if end.strip() and behind.rstrip().endswith(end.strip()):
        behind = behind.rstrip().removesuffix(end.strip())
    before = text[found.start() : place[0]]
    if _NAMES[0] not in before:
        return None
    names = set(calls.answers.special.findall(text + (both or "")))
    tokens = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in names}
    return CallLayout(before, between, behind.rstrip(), calls.answers.opened, tokens)


def _written(tokenizer: PreTrainedTokenizerBase, number: int) -> str | None:
    """What the template writes for so many calls; None where it refuses them."""
    made, tools = [], []
    for name, ident, value in list(zip(_NAMES, _IDS, _VALUES, strict=True))[:number]:
        function = {"name": name, "arguments": {"k": value}}
        made.append({"type": "function", "id": ident, "function": function})
        schema = {"type": "object", "properties": {"k": {"type": "string"}}}
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
    value = text.find(_VALUES[which])
    start, end = text.rfind("{", 0, max(value, 0)), text.find("}", value) + 1
    if min(value, start, end - 1) < 0:
        return None
    try:
        given = json.loads(text[start:end])
    except ValueError:
        return None
    return (start, end) if given == {"k": _VALUES[which]} else None


def _text(text: str) -> str:
    return json.dumps(text)
