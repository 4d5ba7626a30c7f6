"""Fields of `adapter_config.json` beside LoRA's own, and values as other tools write them.

PEFT's fields for methods that lorakit does not have are written as PEFT writes them, refused when
they are active, and named in a warning when they are set and would have no effect. Numbers come as
floats or texts, sets as Python's text of them, unset fields as null: what can mean one thing only
is read as that, and the rest is left for the checks of `config.py` to refuse.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lorakit.errors import InputError


class PeftType(StrEnum):
    """The methods that PEFT's files name; lorakit's is `LORA`."""

    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BOFT = "BOFT"
    C3A = "C3A"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    DEFT = "DEFT"
    DELORA = "DELORA"
    FOURIERFT = "FOURIERFT"
    FROD = "FROD"
    GLORA = "GLORA"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    HRA = "HRA"
    IA3 = "IA3"
    LILY = "LILY"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    LORA = "LORA"
    MISS = "MISS"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    OSF = "OSF"
    PEANUT = "PEANUT"
    POLY = "POLY"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    PSOFT = "PSOFT"
    PVERA = "PVERA"
    P_TUNING = "P_TUNING"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHADOW = "SHADOW"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    TINYLORA = "TINYLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
    VERA = "VERA"
    WAVEFT = "WAVEFT"
    XLORA = "XLORA"


class TaskType(StrEnum):
    """The tasks of models, under PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


_FOR_PEFT_ITSELF = frozenset({"auto_mapping", "peft_version"})
"""They say how PEFT was called, and change no model."""

_INERT = frozenset({"megatron_config", "megatron_core", "qalora_group_size"})
"""Settings of layers and methods that are not there."""


@dataclass(kw_only=True)
class CarriedFields:
    """Fields of PEFT's `LoraConfig` that are carried from file to file, with PEFT's defaults."""

    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    use_qalora: bool = False
    qalora_group_size: int = 16
    alora_invocation_tokens: list[int] | None = None
    arrow_config: Any = None
    use_bdlora: Any = None
    velora_config: Any = None
    monteclora_config: Any = None
    kasa_config: Any = None

    def check_carried(self) -> None:
        """Refuses active fields by name, and warns of those that have no effect.

        Raises:
            InputError: a field asks for a method that lorakit does not have.
        """
        for field in dataclasses.fields(CarriedFields):
            value = getattr(self, field.name)
            if field.name in _FOR_PEFT_ITSELF or value == field.default or not value:
                continue
            if field.name not in _INERT:
                raise InputError(f"{field.name}={value!r} is not supported by lorakit")
            warnings.warn(f"{field.name}={value!r} has no effect in lorakit", stacklevel=5)


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
        elif name == "init_lora_weights" and not isinstance(value, str):
            found[name] = value
        elif isinstance(default, bool) and str(value).lower() in _SWITCHES:
            found[name] = _SWITCHES[str(value).lower()]
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
