"""What is wrong with a recipe, in one line, under the recipe's own names.

A key that it does not have is another tool's name (`other_names.toml`, printed into
docs/other-names.md by `docs/tables.py`), another section's, or a slip of the pen; a name that is
like none is not guessed at.
"""

import dataclasses
import reprlib
import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lorakit.errors import did_you_mean, listed
from lorakit.objectives.registry import with_setting
from lorakit.training.arguments import ARGUMENTS

OTHER_NAMES: Mapping[str, str] = tomllib.loads(
    (files(__package__) / "other_names.toml").read_text(encoding="utf-8")
)
"""By another tool's name, in lower case and with underscores: what to give instead."""

SECTIONS: dict[str, frozenset[str]] = {}
"""The keys of a recipe's sections but `lora`, by what stands before them; `recipe` fills it."""


def in_one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with each key of a `model`, with the nearest valid key."""
    # A union reports each of its branches: the first finding for a key says enough.
    problems = {_key(e, model)[0]: _problem(e, model) for e in reversed(error.errors())}
    return "; ".join(reversed(problems.values()))


def _problem(error: Any, model: type[BaseModel]) -> str:
    """One line for one of pydantic's findings."""
    key, known = _key(error, model)
    if error["type"] in _UNKNOWN_KEY:
        hint = key_hint(str(error["loc"][-1]), known)
        others = "" if hint.startswith(":") else f"; known are {listed(known, 20)}"
        return f"{key} is not a recipe key{hint}{others}"
    if error["type"] == "missing":
        return f"{key} is missing; give it"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "int_parsing_size":
        message = "should be a smaller number"
    if error["type"] == "value_error":
        return message if message.startswith(key.split(".")[0]) else f"{key}: {message}"
    if error["type"] in ("model_type", "dataclass_type", "dict_type"):
        message = f"should be keys and values like {{{listed(known, 3) or 'name: value'}}}"
    if error["type"] == "union_tag_invalid":
        message = "should be a path or a list of sources"
    return f"{key}: {message[0].lower()}{message[1:]}, not {shown(error['input'])}"


_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument", "invalid_key")


def _key(error: Any, model: type[BaseModel]) -> tuple[str, list[str]]:
    """The recipe's own name for where an error is, as `data.train[1].path`, and the keys there.

    Its path has the names of a union's branches too, which are left out.
    """
    key, fields = "", _fields(model)
    path = error["loc"]
    for part in path:
        if isinstance(part, int) and key:
            key += f"[{part}]"
        elif part in fields:
            key += f".{part}"
            fields = _fields(fields[part])
        elif part is path[-1] and error["type"] in _UNKNOWN_KEY:
            key += f".{part}"
    return key.removeprefix("."), list(fields)


def _fields(annotation: Any) -> dict[str, Any]:
    """The keys below a value of this type, with their types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return {field.name: field.type for field in dataclasses.fields(annotation)}
    return {k: v for inner in get_args(annotation) for k, v in _fields(inner).items()}


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 200:  # more digits than Python likes to show
        return f"a number of {value.bit_length()} bits"
    text = _REPR.repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlevel = 3


def key_hint(name: str, known: Iterable[str]) -> str:
    """What follows `… is not a recipe key`: `: use data.max_length`, ` (did you mean 'r'?)`, or
    nothing.

    Args:
        name: the last part of the key, without its section.
        known: the keys that the section has.
    """
    plain = name.strip().lstrip("-").lower().replace("-", "_")
    if hint := OTHER_NAMES.get(plain):
        return f": leave it out: {hint[3:]}" if hint.startswith("-: ") else f": use {hint}"
    if found := _elsewhere(plain):
        return f": {found}"
    return did_you_mean(name, known)


def _elsewhere(name: str) -> str | None:
    """A key of this name in another section of a recipe, or what becomes of it there."""
    from lorakit.lora.config import LoraConfig

    lora = {f.name for f in dataclasses.fields(LoraConfig)} - {"revision", "inference_mode"}
    for section, keys in {**SECTIONS, "lora.": lora | {"parts"}}.items():
        if name in keys:
            return f"use {section}{name}"
    if argument := ARGUMENTS.get(name):
        if argument.treatment == "honoured":
            return f"use training.{name}"
        return f"{'use' if argument.treatment == 'reserved' else 'leave it out:'} {argument.note}"
    if objectives := with_setting(name):
        return f"use objective.{name} (of objective {listed(objectives)})"
    return None
