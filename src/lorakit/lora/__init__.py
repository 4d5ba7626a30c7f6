"""The method: low-rank adapters beside the frozen layers of any `nn.Module`, in pure PyTorch."""

from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import LoraEmbedding, LoraLayer, LoraLinear
from lorakit.lora.model import LoraModel, get_peft_model
from lorakit.lora.recommend import recommended_config

__all__ = [
    "LoraConfig",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "LoraModel",
    "get_peft_model",
    "recommended_config",
]
