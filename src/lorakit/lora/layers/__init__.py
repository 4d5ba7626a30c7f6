"""The wrapped layers, one file a kind of base layer, and the table that chooses among them."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorakit.lora.architecture import is_conv1d
from lorakit.lora.layers.attention import LoraMultiheadAttention
from lorakit.lora.layers.base import LoraLayer
from lorakit.lora.layers.conv import LoraConv
from lorakit.lora.layers.embedding import LoraEmbedding
from lorakit.lora.layers.linear import LoraLinear
from lorakit.lora.layers.mergeable import Mergeable
from lorakit.lora.layers.parameter import LoraParameter
from lorakit.lora.layers.quantized import LoraQuantizedLinear
from lorakit.lora.layers.saved import ModulesToSaveWrapper
from lorakit.lora.layers.tied import LoraTiedEmbedding, LoraTiedHead
from lorakit.lora.layers.tokens import TiedModule, TrainedTokens
from lorakit.weight_formats import is_quantized

__all__ = [
    "LoraConv",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "LoraMultiheadAttention",
    "LoraParameter",
    "LoraQuantizedLinear",
    "LoraTiedEmbedding",
    "LoraTiedHead",
    "Mergeable",
    "ModulesToSaveWrapper",
    "TiedModule",
    "TrainedTokens",
    "Wrapped",
    "layer_class",
]

Wrapped = Mergeable | ModulesToSaveWrapper | TiedModule
"""Everything that stands in the place of a model's own module."""


def layer_class(module: nn.Module) -> type[LoraLayer] | None:
    """The class that wraps `module`, or None when LoRA is not defined for it here."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # `nn.MultiheadAttention` reads its weight and never calls it
    if is_quantized(module):
        return LoraQuantizedLinear
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return LoraLinear
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return LoraConv
    if isinstance(module, nn.MultiheadAttention):
        return LoraMultiheadAttention
    return None
