"""LoRA for language models: train, evaluate, merge and serve low-rank adapters.

The names below are loaded when they are first used, so that `import lorakit` stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import lorakit.models.quantization  # registers the formats of weights
from lorakit.version import __version__

if TYPE_CHECKING:
    from lorakit.adapters.merge import merge as merge
    from lorakit.engine.engine import Engine as Engine
    from lorakit.lora.config import LoraConfig as LoraConfig
    from lorakit.lora.init.corda import CordaConfig as CordaConfig
    from lorakit.lora.init.eva import EvaConfig as EvaConfig
    from lorakit.lora.init.loftq import LoftQConfig as LoftQConfig
    from lorakit.lora.init.lora_ga import LoraGAConfig as LoraGAConfig
    from lorakit.lora.init_from_data import get_eva_state_dict as get_eva_state_dict
    from lorakit.lora.init_from_data import (
        initialize_lora_eva_weights as initialize_lora_eva_weights,
    )
    from lorakit.lora.init_from_data import preprocess_corda as preprocess_corda
    from lorakit.lora.init_from_data import preprocess_loraga as preprocess_loraga
    from lorakit.lora.layers import LoraLinear as LoraLinear
    from lorakit.lora.model import LoraModel as LoraModel
    from lorakit.lora.model import get_peft_model as get_peft_model
    from lorakit.lora.optimizers import create_lorafa_optimizer as create_lorafa_optimizer
    from lorakit.lora.optimizers import create_loraplus_optimizer as create_loraplus_optimizer
    from lorakit.lora.peft_api.hotswap import hotswap_adapter as hotswap_adapter
    from lorakit.lora.peft_api.in_place import (
        get_base_model_state_dict as get_base_model_state_dict,
    )
    from lorakit.lora.peft_api.in_place import get_layer_status as get_layer_status
    from lorakit.lora.peft_api.in_place import get_model_status as get_model_status
    from lorakit.lora.peft_api.in_place import (
        get_peft_model_state_dict as get_peft_model_state_dict,
    )
    from lorakit.lora.peft_api.in_place import inject_adapter_in_model as inject_adapter_in_model
    from lorakit.lora.peft_api.in_place import (
        set_base_model_state_dict as set_base_model_state_dict,
    )
    from lorakit.lora.peft_api.in_place import (
        set_peft_model_state_dict as set_peft_model_state_dict,
    )
    from lorakit.lora.peft_fields import PeftType as PeftType
    from lorakit.lora.peft_fields import TaskType as TaskType
    from lorakit.lora.recommend import recommended_config as recommended_config
    from lorakit.models.auto import AutoModelForCausalLM as AutoModelForCausalLM
    from lorakit.models.auto import AutoTokenizer as AutoTokenizer
    from lorakit.models.load import load_model as load_model
    from lorakit.models.quantization.prepare import (
        prepare_model_for_kbit_training as prepare_model_for_kbit_training,
    )
    from lorakit.sweeps.run_sweep import sweep as sweep
    from lorakit.training.monitor import LoraMonitor as LoraMonitor
    from lorakit.training.run import train as train

    PeftConfig = LoraConfig
    PeftModel = LoraModel
    PeftModelForCausalLM = LoraModel
    PeftModelForFeatureExtraction = LoraModel
    PeftModelForQuestionAnswering = LoraModel
    PeftModelForSeq2SeqLM = LoraModel
    PeftModelForSequenceClassification = LoraModel
    PeftModelForTokenClassification = LoraModel

_BY_MODULE = {
    "lorakit.adapters.merge": "merge",
    "lorakit.engine.engine": "Engine",
    "lorakit.lora.config": "LoraConfig",
    "lorakit.lora.init.corda": "CordaConfig",
    "lorakit.lora.init.eva": "EvaConfig",
    "lorakit.lora.init.loftq": "LoftQConfig",
    "lorakit.lora.init.lora_ga": "LoraGAConfig",
    "lorakit.lora.init_from_data": "get_eva_state_dict initialize_lora_eva_weights "
    "preprocess_corda preprocess_loraga",
    "lorakit.lora.layers": "LoraLinear",
    "lorakit.lora.model": "LoraModel get_peft_model",
    "lorakit.lora.optimizers": "create_lorafa_optimizer create_loraplus_optimizer",
    "lorakit.lora.peft_api.hotswap": "hotswap_adapter",
    "lorakit.lora.peft_api.in_place": "get_base_model_state_dict get_layer_status "
    "get_model_status get_peft_model_state_dict inject_adapter_in_model "
    "set_base_model_state_dict set_peft_model_state_dict",
    "lorakit.lora.peft_fields": "PeftType TaskType",
    "lorakit.lora.recommend": "recommended_config",
    "lorakit.models.auto": "AutoModelForCausalLM AutoTokenizer",
    "lorakit.models.load": "load_model",
    "lorakit.models.quantization.prepare": "prepare_model_for_kbit_training",
    "lorakit.sweeps.run_sweep": "sweep",
    "lorakit.training.monitor": "LoraMonitor",
    "lorakit.training.run": "train",
}
_TASKS = (
    "CausalLM FeatureExtraction QuestionAnswering Seq2SeqLM SequenceClassification "
    "TokenClassification"
)
# One class does what PEFT's have one each for; these names are for scripts that have them.
_PEFT_NAMES = {
    "PeftConfig": "LoraConfig",
    "PeftModel": "LoraModel",
    **{f"PeftModelFor{task}": "LoraModel" for task in _TASKS.split()},
}
_HOMES = {name: module for module, names in _BY_MODULE.items() for name in names.split()}

__all__ = [*sorted([*_HOMES, *_PEFT_NAMES]), "__version__", "lorakit"]


def __getattr__(name: str) -> Any:
    own = _PEFT_NAMES.get(name, name)
    if own not in _HOMES:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[own]), own)


def __dir__() -> list[str]:
    return __all__
