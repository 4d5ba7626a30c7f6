"""Base models whose files hold weights of torchao."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.quantization.backend import Backend

if TYPE_CHECKING:
    import torch
    from torch import nn


class TorchAO(Backend):
    """torchao's tensors, which look as if they had their numbers' dtype."""

    name = "torchao"
    rounds_input = True  # if it was asked to

    def recognises(self, weight: object) -> bool:
        return type(weight).__module__.startswith("torchao.")

    def covers(self, layer: nn.Module) -> bool:
        from torch import nn

        return type(layer) is nn.Linear and self.recognises(layer.weight)

    def dequantize(self, weight: Any, layer: Any, dtype: torch.dtype | None) -> torch.Tensor:
        W = weight.dequantize()
        return W if dtype is None else W.to(dtype)

    def require_gradients(self, weight: Any) -> None:
        import torch

        kind: Any = type(weight)
        if kind.dequantize is torch.Tensor.dequantize:
            raise InputError(
                f"the base's weights are torchao's {kind.__name__}, through which no gradients go: "
                "give the model before quantisation"
            )
