"""The wrapped layers, one file a kind of base layer, and the table that chooses among them."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorakit.lora.layers.base import LoraLayer
from lorakit.lora.layers.embedding import LoraEmbedding
from lorakit.lora.layers.linear import LoraLinear, is_conv1d

__all__ = ["LoraEmbedding", "LoraLayer", "LoraLinear", "is_conv1d", "layer_class"]


def layer_class(module: nn.Module) -> type[LoraLinear] | type[LoraEmbedding] | None:
    """The class that wraps `module`, or None when LoRA is not defined for it here."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # `nn.MultiheadAttention` reads its weight and never calls it
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return LoraLinear
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    return None
