"""Which of PEFT's names are lorakit's, and putting them in the place of PEFT's.

Everything that `lorakit` publishes under a name that `peft` has too takes its place, in every
module of `peft` that has imported it. Classes inside of PEFT whose counterpart here has another
name are in `COUNTERPARTS`.
"""

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

import peft

import lorakit
from lorakit.lora import layers
from lorakit.lora.layers.parameter import LoraParameter
from lorakit.lora.layers.saved import ModulesToSaveWrapper
from lorakit.lora.layers.tokens import TokenRows, TrainedTokens
from lorakit.lora.layers.wrapped import WrappedModule
from lorakit.lora.peft_api import hotswap

COUNTERPARTS: dict[str, Any] = {
    "peft.optimizers.create_lorafa_optimizer": lorakit.create_lorafa_optimizer,
    "peft.optimizers.create_loraplus_optimizer": lorakit.create_loraplus_optimizer,
    "peft.tuners.lora.corda.preprocess_corda": lorakit.preprocess_corda,
    "peft.utils.hotswap.hotswap_adapter": lorakit.hotswap_adapter,
    "peft.utils.hotswap.prepare_model_for_compiled_hotswap": (
        hotswap.prepare_model_for_compiled_hotswap
    ),
    "peft.tuners.lora.layer.LoraLayer": layers.LoraLayer,
    "peft.tuners.lora.layer.Linear": layers.LoraLinear,
    "peft.tuners.lora.layer.Embedding": layers.LoraEmbedding,
    "peft.tuners.lora.layer.Conv1d": layers.LoraConv,
    "peft.tuners.lora.layer.Conv2d": layers.LoraConv,
    "peft.tuners.lora.layer.ParamWrapper": LoraParameter,
    "peft.tuners.tuners_utils.BaseTunerLayer": layers.LoraLayer,
    "peft.utils.warning.PeftWarning": UserWarning,
    "peft.utils.other.ModulesToSaveWrapper": ModulesToSaveWrapper,
    "peft.utils.other.TrainableTokensWrapper": TrainedTokens,
    "peft.utils.other.AuxiliaryTrainingWrapper": (ModulesToSaveWrapper, TrainedTokens),
}


def install() -> None:
    """From here on `from peft import LoraConfig` gives lorakit's."""
    replacements = {id(_find(path)): ours for path, ours in COUNTERPARTS.items()}
    shared = set(lorakit.__all__) & set(dir(peft)) - {"__version__"}
    replacements |= {id(getattr(peft, name)): getattr(lorakit, name) for name in sorted(shared)}
    # What PEFT's tests read of its classes' private parts.
    WrappedModule._adapters = property(lambda self: set(self.adapters))
    WrappedModule._all_available_adapter_names = lambda self: self.adapters
    TokenRows.trainable_tokens_original = {}
    for module in _modules():
        for name, value in list(vars(module).items()):
            if id(value) in replacements and not name.startswith("__"):
                setattr(module, name, replacements[id(value)])


def _modules() -> list[ModuleType]:
    """All of PEFT's modules that can be imported here."""
    for found in pkgutil.walk_packages(peft.__path__, "peft."):
        try:
            importlib.import_module(found.name)
        except ImportError:
            continue  # for packages that are not installed
    return [m for name, m in sys.modules.items() if name.partition(".")[0] == "peft" and m]


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
