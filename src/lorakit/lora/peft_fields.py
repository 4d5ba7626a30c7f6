"""Words and fields of PEFT's configuration that every configuration of its kind has.

The fields here are PEFT's for methods that lorakit does not have, or for PEFT's own use. They are
written to files as PEFT writes them, refused when they are active, and named in a warning when
they are set and would have no effect.
"""

import dataclasses
import warnings
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
    """What the model is for, in PEFT's words."""

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
