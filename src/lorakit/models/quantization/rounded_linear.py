"""Linear layers with weights that are rounded for inference on a CPU.

A few tokens are multiplied by the integers as they are (a product reads half of what bfloat16
takes, or less); many, and those that need gradients, by the unpacked weight.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lorakit.lora.spans import lora_spans
from lorakit.weight_formats import dequantized

MULTIPLIED = (torch.bfloat16, torch.float32)


class RoundedWeight(nn.Parameter):
    """The integers that stand for a weight (d_out, d_in). A subclass is one form of them.

    Attributes:
        form: as `--weights` names it.
        in_a_byte: how many integers.
        few_tokens: more take longer by `product` than unpacking does.
        scales: what the integers are multiplied by, of bfloat16.
        shared: the weight that these integers stand for, where other modules have it too.
    """

    form: ClassVar[str]
    in_a_byte: ClassVar[int]
    few_tokens: ClassVar[int]
    scales: torch.Tensor
    shared: nn.Parameter

    @classmethod
    def of(cls, W: torch.Tensor) -> Self:
        """`W` (d_out, d_in), rounded."""
        raise NotImplementedError

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """What the integers stand for: (d_out, d_in) of `dtype`, rounded once."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T`, of few tokens (tokens, d_in) in one of `MULTIPLIED` on a CPU."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> RoundedWeight:
        copied = type(self)(self.data.clone(), False)
        copied.scales = self.scales.clone()
        memo[id(self)] = copied
        return copied


class RoundedLinear(nn.Linear):
    """A linear layer with a `RoundedWeight`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T + b`; x (…, d_in)."""
        weight: Any = self.weight
        few = x.shape[:-1].numel() <= weight.few_tokens
        as_they_are = few and x.dtype in MULTIPLIED and x.device.type == "cpu"
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled() or not as_they_are:
            return lora_spans(x, partial(self._unpacked, x.dtype), bias, (), ())
        y = weight.product(x.reshape(-1, x.shape[-1]).contiguous())
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantized(self.weight, self, dtype)
