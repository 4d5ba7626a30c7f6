"""LoRA beside bitsandbytes' linear layers of 8 and 4 bits (QLoRA)."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers.linear import LoraLinear

_SCALES = "lora_scales"
"""Where a weight of 8 bits keeps its scales; bitsandbytes moves them into its layer's state."""


class LoraQuantizedLinear(LoraLinear):
    """`y = base(x) + scaling * dropout(x) A^T B^T` beside a quantised, frozen linear layer.

    The adapter is exact beside whatever the base computes, and no copy of the weight is kept. DoRA
    and starts from the weight take the weight as it is stored, dequantised for the moment.
    """

    def _shape(self) -> tuple[int, int]:
        return self.base_layer.out_features, self.base_layer.in_features

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return dequantized(weight, getattr(self.base_layer, "state", None))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As every layer's, with gradients for `x` also after an evaluation."""
        weight: Any = self.base_weight
        if x.requires_grad and torch.is_grad_enabled() and _is_packed(weight):
            # bitsandbytes has laid the weight out for its fastest product, which has no gradient.
            weight.data, weight.quant_state = unpacked(weight)
        return super().forward(x, *args, **kwargs)

    def _base_product(
        self, x: torch.Tensor, y: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        product = y if dropped is x else self.base_layer(dropped)
        bias = self.base_bias
        return product if bias is None else product - bias.to(product.dtype)

    def _quantize_base(self, name: str, config: LoraConfig) -> None:
        raise InputError("init_lora_weights='loftq' needs a base that is not quantised yet")

    @torch.no_grad()
    def merged_parameter(self, parameter: str, names: Sequence[str]) -> torch.Tensor:
        if parameter != self.weight_name:
            return super().merged_parameter(parameter, names)
        W = self._as_matrix(self._unmerged(self.weight_name)).float()
        return W + sum(self._weight_update(name).float() for name in names)

    def _as_parameter(self, total: torch.Tensor, before: nn.Parameter) -> nn.Parameter:
        if before.dtype.is_floating_point:
            return super()._as_parameter(total, before)  # a bias
        warnings.warn(
            "merging into a quantised layer rounds its weight again: for an exact merge load the "
            "base unquantised",
            stacklevel=5,
        )
        return quantized(total, before)

    def unmerge(self) -> None:
        """Gives the base layer the very weight back that it had before merging."""
        super().unmerge()
        weight: Any = self.base_weight
        if hasattr(weight, _SCALES):  # the layer reads both anew at its next call
            weight.CB, weight.SCB = weight.data, getattr(weight, _SCALES)


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes."""
    return _bits(getattr(module, "weight", None)) is not None


def dequantized(weight: Any, state: Any = None) -> torch.Tensor:
    """The numbers that a quantised weight stands for (d_out, d_in)."""
    from bitsandbytes import functional

    if _bits(weight) == 4:
        return functional.dequantize_4bit(*unpacked(weight))
    scales = getattr(weight, _SCALES, None)
    if scales is None:
        scales = state.SCB if weight.SCB is None else weight.SCB
        setattr(weight, _SCALES, scales)
    return functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))


def unpacked(weight: Any) -> tuple[torch.Tensor, Any]:
    """A weight of 4 bits and its state, in the layout in which it was quantised."""
    if not _is_packed(weight):
        return weight.data, weight.quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    return _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


def quantized(W: torch.Tensor, like: Any) -> nn.Parameter:
    """`W` (d_out, d_in) stored as the weight `like` is."""
    from bitsandbytes.nn import Int8Params, Params4bit

    W = W.detach().contiguous()
    if _bits(like) == 8:
        return Int8Params(W, requires_grad=False, has_fp16_weights=False).to(like.device)
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    settings = {name: getattr(like, name) for name in names}
    W = W.to(like.quant_state.dtype)
    return Params4bit(W, requires_grad=False, **settings).to(like.device)


def _is_packed(weight: Any) -> bool:
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def _bits(weight: object) -> int | None:
    return {"Params4bit": 4, "Int8Params": 8}.get(type(weight).__name__)
