"""The built-in rewards: one small file each, and one line here.

Each is a class whose fields are its settings, and whose objects are called as a user's function is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any

from lorakit.errors import InputError, did_you_mean, listed

BUILT_IN = {
    "exact_match": "lorakit.rewards.builtin.exact_match:ExactMatch",
    "regex": "lorakit.rewards.builtin.regex:Regex",
    "json": "lorakit.rewards.builtin.json_text:JsonText",
    "json_schema": "lorakit.rewards.builtin.json_schema:JsonSchema",
    "math_verify": "lorakit.rewards.builtin.math_answer:MathAnswer",
    "format": "lorakit.rewards.builtin.tag_format:TagFormat",
    "length": "lorakit.rewards.builtin.target_length:TargetLength",
    "overlong": "lorakit.rewards.builtin.overlong:Overlong",
    "repetition": "lorakit.rewards.builtin.repetition:Repetition",
}
"""Where each is defined; loaded when it is first used."""


def built_in(name: str, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """The built-in reward of this name with its settings.

    Raises:
        InputError: it has no such setting, one is missing, or a value cannot be used.
    """
    kind = _class(name)
    known = {one.name: one for one in fields(kind)}
    for key in settings:
        if key not in known:
            others = listed(known) or "none"
            raise InputError(
                f"rewards: {name} has no setting {key}{did_you_mean(key, known)}; it has {others}"
            )
    for key, one in known.items():
        required = one.default is MISSING and one.default_factory is MISSING
        if required and key not in settings:
            raise InputError(f"rewards: {name} needs the setting {key}")
    try:
        made: Callable[..., Any] = kind(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"rewards: {name}: {error}") from error
    return made


def main_setting(name: str) -> str | None:
    """The setting that the short form `{NAME: VALUE}` gives; None where there is none."""
    return getattr(_class(name), "main", None) if name in BUILT_IN else None


def columns_of(reward: Any) -> list[str]:
    """The columns that a built-in reward reads."""
    column = getattr(reward, "column", None)
    return [column] if isinstance(column, str) else []


def _class(name: str) -> Any:
    module, _, attribute = BUILT_IN[name].partition(":")
    return getattr(import_module(module), attribute)
