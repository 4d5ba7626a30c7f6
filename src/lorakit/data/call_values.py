"""The values of arguments that a template writes otherwise than as JSON.

Tags have no quotes, so `5` may be a number or a text, and the function's JSON schema says which.
Calls in Python's form have literals of Python's or of JSON's.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from lorakit.data import strict_json

Tools = Sequence[Mapping[str, Any]]
_DEEPEST = 20


class Expected(NamedTuple):
    """What a schema says of a value: its JSON types (none for any), and texts that it names."""

    kinds: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()

    @property
    def is_text(self) -> bool:
        """Whether it is a string and nothing else."""
        return self.kinds == {"string"}


ANYTHING = Expected()


def properties_of(name: str, tools: Tools) -> dict[str, Expected]:
    """What is expected of a function's arguments, by their names."""
    functions = (tool.get("function", tool) for tool in tools)
    found: Mapping[str, Any] = next((f for f in functions if f.get("name") == name), {})
    schema = found.get("parameters") or {}
    given = schema.get("properties") if isinstance(schema, dict) else None
    return {key: expected(value, schema) for key, value in (given or {}).items()}


def value(text: str, wanted: Expected) -> Any:
    """What a text stands for: itself where it must be a string, else its JSON, if it is some."""
    if wanted.is_text or text in wanted.texts:
        return text
    spelled = {"True": True, "False": False, "None": None}
    try:
        made = spelled[text.strip()] if text.strip() in spelled else strict_json.parse(text)
    except ValueError:
        return text
    fits = not wanted.kinds or _kinds_of(made) & wanted.kinds
    may_be_text = "string" in wanted.kinds
    return text if may_be_text and (not fits or isinstance(made, str)) else made


def expected(schema: Any, root: Any, depth: int = 0) -> Expected:
    """What a schema says of its values.

    Args:
        root: what `$ref` is relative to.
    """
    schema = resolved(schema, root)
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return ANYTHING
    own = schema.get("type", ())
    kinds = {own} if isinstance(own, str) else {str(one) for one in own}
    named = [schema["const"]] if "const" in schema else list(schema.get("enum") or ())
    texts = {one for one in named if isinstance(one, str)}
    if not kinds:
        kinds = set[str]().union(*map(_kinds_of, named))
    for name in ("anyOf", "oneOf"):
        parts = [expected(one, root, depth + 1) for one in schema.get(name) or ()]
        texts |= set[str]().union(*(part.texts for part in parts))
        if all(part.kinds for part in parts):  # one that says nothing may be anything
            kinds |= set[str]().union(*(part.kinds for part in parts))
    return Expected(frozenset(kinds), frozenset(texts))


def resolved(schema: Any, root: Any) -> Any:
    """A schema, or the one in `root` that its `$ref` names."""
    for _ in range(_DEEPEST):
        where = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(where, str) or not where.startswith("#/"):
            break
        found = root
        for step in where[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, dict) else None
        schema = found
    return schema


def _kinds_of(given: Any) -> set[str]:
    if isinstance(given, bool):
        return {"boolean"}
    if isinstance(given, int) or (isinstance(given, float) and given.is_integer()):
        return {"integer", "number"}
    kinds = {float: "number", str: "string", list: "array", dict: "object", type(None): "null"}
    return {kinds[type(given)]}


def literal(node: ast.expr, source: str) -> Any:
    """A literal of Python's, or of JSON's, whose names and escapes templates write too."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [literal(one, source) for one in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else literal(key, source) for key in node.keys]
        return {key: literal(one, source) for key, one in zip(keys, node.values, strict=True)}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        with suppress(ValueError):
            return json.loads(ast.get_source_segment(source, node) or "")
    return ast.literal_eval(node)


_JSON_NAMES = {"true": True, "false": False, "null": None}
