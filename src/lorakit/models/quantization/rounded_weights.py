"""Weights that are rounded for inference on a CPU, as a format: `int8` and `int4`.

What the integers of a form stand for says its own file (`int8_weight.py`, `int4_weight.py`);
`rounded_linear.py` has the layers that compute with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit.weight_formats import WeightFormat

if TYPE_CHECKING:
    import torch


class RoundedWeights(WeightFormat):
    """A `RoundedWeight` of the form `name`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def recognises(self, weight: object) -> bool:
        return getattr(type(weight), "form", None) == self.name

    def dequantize(self, weight: Any, layer: Any, dtype: torch.dtype | None) -> torch.Tensor:
        import torch

        unpacked: torch.Tensor = weight.unpacked(dtype or torch.float32)
        return unpacked

    def numel(self, weight: Any) -> int:
        return int(weight.numel() * weight.in_a_byte)

    def quantize(self, W: torch.Tensor, like: Any) -> Any:
        return type(like).of(W)
