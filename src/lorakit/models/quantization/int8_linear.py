"""Linear layers with `Int8Weights`.

A few tokens are multiplied by the integers as they are (a product reads half of what bfloat16
takes); many, and those that need gradients, by the unpacked weight.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from lorakit.lora.spans import lora_spans
from lorakit.weight_formats import dequantized

FEW_TOKENS = 32
"""So many tokens at most are multiplied by the integers: more take longer than unpacking does."""

MULTIPLIED = (torch.bfloat16, torch.float32)


class Int8Weight(nn.Parameter):
    """The integers (d_out, d_in) of int8.

    Attributes:
        scales: (d_out,) of bfloat16.
        shared: the weight that these integers stand for, where other modules have it too.
    """

    scales: torch.Tensor
    shared: nn.Parameter

    @classmethod
    def of(cls, W: torch.Tensor) -> Int8Weight:
        """`W` (d_out, d_in), rounded."""
        wide = W.detach().float()
        exact = wide.abs().amax(1).clamp_(min=1e-30) / 127
        scales = exact.to(torch.bfloat16)
        up = torch.nextafter(scales, torch.full_like(scales, torch.inf))
        scales = torch.where(scales.float() < exact, up, scales)
        weight = cls(wide.div(scales.float()[:, None]).round_().to(torch.int8), False)
        weight.scales = scales
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        copied = type(self)(self.data.clone(), False)
        copied.scales = self.scales.clone()
        memo[id(self)] = copied
        return copied


class Int8Linear(nn.Linear):
    """A linear layer with an `Int8Weight`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T + b`; x (…, d_in)."""
        weight: Any = self.weight
        tokens = x.shape[:-1].numel()
        few = tokens <= FEW_TOKENS and x.dtype in MULTIPLIED and x.device.type == "cpu"
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled() or not few:
            return lora_spans(x, partial(self._unpacked, x.dtype), bias, (), ())
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch._weight_int8pack_mm(rows, weight.data, weight.scales.to(x.dtype))
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantized(self.weight, self, dtype)
