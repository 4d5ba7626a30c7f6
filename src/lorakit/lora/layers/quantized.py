"""LoRA beside quantised linear layers: bitsandbytes' of 8 and 4 bits (QLoRA), and torchao's."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.kernels import Weight
from lorakit.lora.layers.linear import LoraLinear
from lorakit.lora.spans import lora_spans

_SCALES = "lora_scales"
"""Where a weight of 8 bits keeps its scales; bitsandbytes moves them into its layer's state."""


class LoraQuantizedLinear(LoraLinear):
    """`y = x W^T + b + scaling * dropout(x) A^T B^T` beside a quantised, frozen `W`.

    `W` is what the stored weight stands for. It is unpacked for one product at a time, forwards
    and backwards, and no copy of it is kept. DoRA and starts from the weight take it the same way.

    Raises:
        InputError: torchao has no way from the stored weight back to its numbers.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any) -> None:
        forbid_packing(base_layer)
        kind: Any = type(base_layer.weight)
        if from_torchao(base_layer.weight) and kind.dequantize is torch.Tensor.dequantize:
            raise InputError(
                f"the base's weights are torchao's {kind.__name__}, through which no gradients go: "
                "give the model that it was made of"
            )
        super().__init__(base_layer, *args, **options)

    def _shape(self) -> tuple[int, int]:
        return self.base_layer.out_features, self.base_layer.in_features

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return dequantized(weight, getattr(self.base_layer, "state", None))

    def _base(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Of 8 bits bitsandbytes may round the input too; so does torchao, if it was asked to.
        rounds_input = _bits(self.base_weight) == 8 or from_torchao(self.base_weight)
        if not rounds_input or not self._plain_products(x):
            return super()._base(x, *args, **kwargs)
        return lora_spans(x, self._frozen_weight(x), self.base_layer.bias, (), ())

    def _base_product(
        self, x: torch.Tensor, y: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        product = y if dropped is x else self._base(dropped)
        bias = self.base_bias
        return product if bias is None else product - bias.to(product.dtype)

    def _frozen_weight(self, x: torch.Tensor) -> Weight:
        return partial(self._unpacked, x.dtype)

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantized(self.base_weight, getattr(self.base_layer, "state", None), dtype)

    def _fusable(self, x: torch.Tensor, name: str) -> bool:
        # Without gradients a GPU multiplies by weights of 4 bits faster than it unpacks them.
        fast = x.is_cuda and _bits(self.base_weight) == 4 and not torch.is_grad_enabled()
        return not fast and super()._fusable(x, name)

    def _plain_products(self, x: torch.Tensor) -> bool:
        compute = getattr(self.base_layer, "compute_dtype", None)
        bias = self.base_layer.bias
        return (
            x.is_floating_point()
            and compute in (None, x.dtype)
            and (bias is None or bias.dtype == x.dtype)
        )

    def _quantize_base(self, name: str, config: LoraConfig) -> None:
        raise InputError("init_lora_weights='loftq' needs a base that is not quantised yet")

    @torch.no_grad()
    def merged_parameter(self, parameter: str, names: Sequence[str]) -> torch.Tensor:
        if parameter != self.weight_name:
            return super().merged_parameter(parameter, names)
        W = self._as_matrix(self._unmerged(self.weight_name)).float()
        return W + sum(self._weight_update(name).float() for name in names)

    def _as_parameter(self, total: torch.Tensor, before: nn.Parameter) -> nn.Parameter:
        if from_torchao(before):
            warnings.warn(
                "merging into a layer of torchao leaves its weight unpacked: it takes more memory",
                stacklevel=5,
            )
            return nn.Parameter(total.to(before.dtype), requires_grad=False)
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
    """Whether this is a linear layer of bitsandbytes, or one with a weight of torchao."""
    weight = getattr(module, "weight", None)
    return _bits(weight) is not None or (type(module) is nn.Linear and from_torchao(weight))


def from_torchao(weight: object) -> bool:
    """Whether this is one of torchao's tensors, which look as if they had their numbers' dtype."""
    return type(weight).__module__.startswith("torchao.")


def dequantized(weight: Any, state: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The numbers that a quantised weight stands for (d_out, d_in).

    Args:
        weight: one that is not quantised stands for itself.
        state: of a layer of 8 bits, which has the scales once it was called.
        dtype: to round them to, once; None for the one that the weight was quantised from, and
            float32 for bitsandbytes' 8 bits.
    """
    if _bits(weight) != 8:
        W = weight
        if from_torchao(weight):
            W = weight.dequantize()
        elif _bits(weight) == 4:
            from bitsandbytes import functional

            W = functional.dequantize_4bit(weight.data, weight.quant_state)
        return W if dtype is None else W.to(dtype)
    scales = getattr(weight, _SCALES, None)
    if scales is None:
        scales = state.SCB if weight.SCB is None else weight.SCB
        setattr(weight, _SCALES, scales)
    # Whole numbers of 8 bits are exact in every dtype, so that this rounds once.
    whole = weight.data.to(dtype or torch.float32)
    return whole.mul_(scales.to(weight.device).mul(1 / 127).unsqueeze(1))


def forbid_packing(layer: Any) -> None:
    """Keeps a layer of 4 bits as it was quantised.

    On a processor with AVX512-BF16 bitsandbytes lays it out anew when it is evaluated: scales are
    rounded to bfloat16 for good, products are bfloat16's whatever the input is, and gradients for
    the input are gone.
    """
    if not hasattr(layer, "support_avx512bf16_for_cpu"):
        return
    layer.support_avx512bf16_for_cpu = False
    weight = layer.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = _laid_out_again(weight)


def _laid_out_again(weight: Any) -> tuple[torch.Tensor, Any]:
    """A packed weight and its state in the layout in which it was quantised."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales = weight.quant_state.absmax.T.reshape(-1).float()
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    if not state.nested:  # bitsandbytes 0.50 leaves these turned
        state.absmax = scales
    return data, state


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


def _bits(weight: object) -> int | None:
    return {"Params4bit": 4, "Int8Params": 8}.get(type(weight).__name__)
