"""Values of `adapter_config.json` as other tools write them, made those that a `LoraConfig` has.

Numbers come as floats or texts, sets as Python's text of them, unset fields as null, and other
tools add fields of their own. What can mean one thing only is read as that; the rest is left as it
is, for the checks of `config.py` to refuse.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

_WHOLE = ("r", "rank_pattern", "layers_to_transform", "trainable_token_indices")
_NUMBERS = ("lora_alpha", "alpha_pattern", "lora_dropout")
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
_ENUMS = ("peft_type", "task_type")
_NEEDED = ("r", "lora_alpha")
_SWITCHES = {"true": True, "false": False, "1": True, "0": False}

_TRAINING = frozenset({"lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "merge_weights"})
"""Fields of ms-swift and of PEFT before 0.3 that say how it was trained, and change no model."""
_LORA = {"swift_type": "LORA"}


def is_inert(name: str, value: object) -> bool:
    """Whether a field that PEFT does not have says nothing about the model, whatever its value."""
    return name in _TRAINING or (name in _LORA and str(value).upper() == _LORA[name])


def as_meant(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file with the types that they have in a `LoraConfig`.

    Args:
        defaults: of all fields that a `LoraConfig` has; null is the default of all but the rank
            and alpha.
    """
    found = {}
    for name, value in values.items():
        default = defaults.get(name)
        if value is None and default is not None and name not in _NEEDED:
            found[name] = default
        elif name in _WHOLE:
            found[name] = _everywhere(value, whole)
        elif name in _NUMBERS:
            found[name] = _everywhere(value, _number)
        elif name in _NAMES and isinstance(value, str):
            found[name] = _collection(value)
        elif name in _ENUMS and isinstance(value, str):
            found[name] = value.rpartition(".")[2]  # str() of an enum's member
        elif isinstance(default, bool) and str(value).lower() in _SWITCHES:
            found[name] = _switch(name, value)
        else:
            found[name] = value
    return found


def whole(value: Any) -> Any:
    """`16` for `16`, `16.0`, `"16"` and NumPy's integers; what is no whole number as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() and len(value) < 20 else value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return whole(number) if value.strip().isdecimal() else number


def _switch(name: str, value: Any) -> Any:
    if name == "init_lora_weights" and not isinstance(value, str):
        return value
    return _SWITCHES[str(value).lower()]


def _everywhere(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _everywhere(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_everywhere(one, change) for one in value]
    return change(value)


def _collection(text: str) -> str | list[str]:
    """The names in `"['q_proj', 'v_proj']"` or `"{'q_proj'}"`; any other text as it is."""
    if not (text.startswith(("[", "{")) and text.endswith(("]", "}"))):
        return text
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    if isinstance(names, (list, set)) and all(isinstance(name, str) for name in names):
        return sorted(names) if isinstance(names, set) else names
    return text
