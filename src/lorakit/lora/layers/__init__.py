"""The wrapped layers, one file a kind of base layer, and the registry that chooses among them."""

from collections.abc import Callable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorakit.lora.architecture import is_conv1d
from lorakit.lora.layers.attention import LoraMultiheadAttention
from lorakit.lora.layers.conv import LoraConv
from lorakit.lora.layers.embedding import LoraEmbedding
from lorakit.lora.layers.layer import LoraLayer
from lorakit.lora.layers.linear import LoraLinear, is_product
from lorakit.lora.layers.parameter import LoraParameter
from lorakit.lora.layers.quantized import LoraQuantizedLinear
from lorakit.lora.layers.saved import ModulesToSaveWrapper
from lorakit.lora.layers.tied import LoraTiedEmbedding, LoraTiedHead
from lorakit.lora.layers.tokens import TiedModule, TrainedHead, TrainedTokens
from lorakit.lora.layers.wrapped import WrappedModule, unwrapped
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
    "TrainedHead",
    "TrainedTokens",
    "WrappedModule",
    "layer_class",
    "register_layer",
    "unwrapped",
]

Mergeable = LoraLayer | TrainedTokens
"""The wrappers whose adapters can be merged into the base's parameters."""


Test = Callable[[nn.Module], bool]

_KINDS: list[tuple[Test, type[LoraLayer]]] = []


def register_layer(
    layer: type[LoraLayer], *types: type[nn.Module], test: Test | None = None
) -> None:
    """Makes `layer` wrap modules of these types, or those that pass `test`.

    What is registered later is asked first.
    """
    _KINDS.insert(0, (test or (lambda module: isinstance(module, types)), layer))


register_layer(LoraMultiheadAttention, nn.MultiheadAttention)
register_layer(LoraConv, nn.Conv1d, nn.Conv2d, nn.Conv3d)
register_layer(LoraEmbedding, nn.Embedding)
register_layer(LoraLinear, test=is_product)
register_layer(LoraLinear, test=is_conv1d)
register_layer(LoraQuantizedLinear, test=is_quantized)


def layer_class(module: nn.Module) -> type[LoraLayer] | None:
    """The class that wraps `module`, or None when LoRA is not defined for it here."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # `nn.MultiheadAttention` reads its weight and never calls it
    return next((layer for test, layer in _KINDS if test(module)), None)
