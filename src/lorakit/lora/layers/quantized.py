"""LoRA beside a linear layer whose weight is quantised, in any registered format."""

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
from lorakit.weight_formats import dequantized, format_of


class LoraQuantizedLinear(LoraLinear):
    """`y = x W^T + b + scaling * dropout(x) A^T B^T` beside a quantised, frozen `W`.

    `W` is what the stored weight stands for. It is unpacked for one product at a time, forwards
    and backwards, and no copy of it is kept. DoRA and starts from the weight take it the same way.

    Raises:
        InputError: no gradients can go through the stored weight.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any) -> None:
        if stored := format_of(base_layer.weight):
            stored.keep_exact(base_layer)
            stored.require_gradients(base_layer.weight)
        super().__init__(base_layer, *args, **options)

    def _shape(self) -> tuple[int, int]:
        return self.base_layer.out_features, self.base_layer.in_features

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return dequantized(weight, self.base_layer)

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        stored = format_of(self.base_weight)
        if stored is None or not stored.rounds_input or not self._plain_products(x):
            return super().base_output(x, *args, **kwargs)
        return lora_spans(x, self._frozen_weight(x), self.base_layer.bias, (), ())

    def _base_product(
        self, x: torch.Tensor, y: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        product = y if dropped is x else self.base_output(dropped)
        bias = self.base_bias
        return product if bias is None else product - bias.to(product.dtype)

    def _frozen_weight(self, x: torch.Tensor) -> Weight:
        return partial(self._unpacked, x.dtype)

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantized(self.base_weight, self.base_layer, dtype)

    def is_plain(self, x: torch.Tensor, name: str) -> bool:
        if x.is_cuda and not torch.is_grad_enabled():
            stored = format_of(self.base_weight)
            if stored is not None and stored.fast_without_gradients:
                return False
        return super().is_plain(x, name)

    def _plain_products(self, x: torch.Tensor) -> bool:
        compute = getattr(self.base_layer, "compute_dtype", None)
        bias = self.base_layer.bias
        return (
            x.is_floating_point()
            and compute in (None, x.dtype)
            and (bias is None or bias.dtype == x.dtype)
        )

    def _check(self, config: LoraConfig) -> None:
        if config.init.kind.changes_base:
            raise InputError(
                f"init_lora_weights='{config.init_lora_weights}' needs a base that is not "
                "quantised yet"
            )

    @torch.no_grad()
    def merged_parameter(self, parameter: str, names: Sequence[str]) -> torch.Tensor:
        if parameter != self.weight_name:
            return super().merged_parameter(parameter, names)
        W = self._as_matrix(self._unmerged(self.weight_name)).float()
        return W + sum(self._weight_update(name).float() for name in names)

    def _as_parameter(self, total: torch.Tensor, before: nn.Parameter) -> nn.Parameter:
        if (stored := format_of(before)) is None:
            return super()._as_parameter(total, before)  # a bias
        again = stored.quantize(total, before)
        if again is None:
            warnings.warn(
                f"merging into a layer of {stored.name} leaves its weight unpacked: it takes more "
                "memory",
                stacklevel=5,
            )
            dtype = before.dtype if before.dtype.is_floating_point else total.dtype
            return nn.Parameter(total.to(dtype), requires_grad=False)
        warnings.warn(
            "merging into a quantised layer rounds its weight again: for an exact merge load the "
            "base unquantised",
            stacklevel=5,
        )
        return again

    def unmerge(self) -> None:
        """Gives the base layer the very weight back that it had before merging."""
        super().unmerge()
        if (stored := format_of(self.base_weight)) is not None:
            stored.restored(self.base_weight)
