"""Linear layers whose weights stay as published files pack them, until a product needs them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lorakit.lora.spans import lora_spans
from lorakit.weight_formats import dequantized


class PackedWeight(nn.Parameter):
    """The packed numbers of one weight, with the other tensors that they are unpacked with.

    `packing` is a `packed.Packing`, and `parts` are those tensors by their roles. Floating point
    of 8 bits is held as bytes, as torch does not compute with it.
    """

    packing: Any
    parts: dict[str, torch.Tensor]

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor], packing: Any) -> PackedWeight:
        """The weight of `parts`, by their roles."""
        main = parts[packing.backend.main]
        weight = cls(main.view(torch.uint8) if main.itemsize == 1 else main, requires_grad=False)
        weight.packing = packing
        weight.parts = {role: t for role, t in parts.items() if role != packing.backend.main}
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        parts = {role: copy.deepcopy(part, memo) for role, part in self.parts.items()}
        copied = self.of({**parts, self.packing.backend.main: self.data.clone()}, self.packing)
        memo[id(self)] = copied
        return copied


class PackedLinear(nn.Linear):
    """A linear layer with a packed weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T + b`; the backward pass unpacks `W` again in place of keeping it."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return lora_spans(x, partial(self._unpacked, x.dtype), bias, (), ())

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantized(self.weight, self, dtype)


def make_packed(layer: Any) -> None:
    """Makes the plain linear `layer` a packed one, which lacks its weight yet."""
    layer.__class__ = PackedLinear
    layer.register_parameter("weight", None)
    layer._is_hf_initialized = True  # transformers has nothing to fill


def plain_linears(model: Any) -> Any:
    """`model`, whose packed linear layers were unpacked, with plain ones."""
    packed: list[Any] = [module for module in model.modules() if type(module) is PackedLinear]
    for layer in packed:
        layer.__class__ = nn.Linear
    return model
