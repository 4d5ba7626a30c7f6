"""LoRA for language models: train, evaluate, merge and serve low-rank adapters.

The names below are loaded when they are first used, so that `import lorakit` stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.adapters.merge import merge as merge
    from lorakit.lora import LoraConfig as LoraConfig
    from lorakit.lora import LoraLinear as LoraLinear
    from lorakit.lora import LoraModel as LoraModel
    from lorakit.lora import get_peft_model as get_peft_model
    from lorakit.lora import recommended_config as recommended_config
    from lorakit.models import load_model as load_model
    from lorakit.training.monitor import LoraMonitor as LoraMonitor
    from lorakit.training.run import train as train

    PeftModel = LoraModel

__version__ = "0.1.0"

_HOMES = {
    "LoraConfig": ("lorakit.lora", "LoraConfig"),
    "LoraLinear": ("lorakit.lora", "LoraLinear"),
    "LoraModel": ("lorakit.lora", "LoraModel"),
    "LoraMonitor": ("lorakit.training.monitor", "LoraMonitor"),
    "PeftModel": ("lorakit.lora", "LoraModel"),
    "get_peft_model": ("lorakit.lora", "get_peft_model"),
    "load_model": ("lorakit.models.load", "load_model"),
    "merge": ("lorakit.adapters.merge", "merge"),
    "recommended_config": ("lorakit.lora", "recommended_config"),
    "train": ("lorakit.training.run", "train"),
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
