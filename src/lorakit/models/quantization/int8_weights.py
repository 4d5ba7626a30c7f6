"""Weights of 8 bits for inference: integers with a scale for each output channel.

`W ≈ s · q` with `q = round(W / s)` in [-127, 127] and `s` (d_out,) a row's largest magnitude by 127
(absmax rounding, as in Dettmers et al. 2022, arXiv:2208.07339, of the weights alone). Scales are
rounded up to bfloat16 before, so that the same weights are meant in every dtype. The layers that
compute with them are `int8_linear.py`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit.weight_formats import WeightFormat

if TYPE_CHECKING:
    import torch


class Int8Weights(WeightFormat):
    """An `Int8Weight`."""

    name = "int8"

    def recognises(self, weight: object) -> bool:
        return type(weight).__name__ == "Int8Weight"

    def dequantize(self, weight: Any, layer: Any, dtype: torch.dtype | None) -> torch.Tensor:
        import torch

        dtype = dtype or torch.float32
        wide = torch.promote_types(dtype, torch.float32)
        return weight.data.to(wide).mul_(weight.scales.to(wide)[:, None]).to(dtype)

    def quantize(self, W: torch.Tensor, like: Any) -> Any:
        return type(like).of(W)
