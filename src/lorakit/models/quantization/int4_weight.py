"""Weights of 4 bits: integers with a step and a middle for each 32 inputs of an output channel.

`W ≈ s · (q - 8) + m` with `q = round((W - m) / s) + 8` in [0, 15]. At first a group's least number
is 0 and its largest 15 (round to nearest, asymmetric, zero within the range); then the `s` and `m`
of least squares for these `q`, and the nearest `q` again, take turns (Lloyd's algorithm on a
uniform grid; Lloyd 1982, IEEE Transactions on Information Theory 28(2)). `s` and `m` are rounded to
bfloat16 each time, so that the same weights are meant in every dtype.

The integers lie as PyTorch's product for processors with AVX-512 reads them
(`aten/src/ATen/native/cpu/int4mm_kernel.cpp`); the compiled step's reads them on every processor.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import linalg
from torch.nn.functional import linear

from lorakit.models.quantization.rounded_linear import RoundedWeight

GROUP = 32
"""Inputs with one step and middle."""

BLOCK = 64
"""Outputs whose integers lie together."""

TURNS = 4
"""Of least squares: the error shrinks by 5, 2, 1 and less than 1 %."""


class Int4Weight(RoundedWeight):
    """The integers (d_out, d_in / 2) of uint8, and scales (d_in / 32, d_out, 2): steps and middles.

    A block of 64 outputs has 32 bytes for each input, one input behind the other: byte j has output
    j in its lower four bits, and output 32 + j in its upper ones.
    """

    form = "int4"
    in_a_byte = 2
    few_tokens = 96

    @staticmethod
    def fits(W: torch.Tensor) -> bool:
        """Whether blocks and groups divide `W` (d_out, d_in)."""
        return W.shape[0] % BLOCK == 0 and W.shape[1] % GROUP == 0

    @classmethod
    def of(cls, W: torch.Tensor) -> Int4Weight:
        if not cls.fits(W):
            raise ValueError(f"{tuple(W.shape)} is no whole number of blocks and groups")
        d_out, d_in = W.shape
        groups = W.detach().float().view(d_out, -1, GROUP)
        step, middle = _grid(groups)
        q = _nearest(groups, step, middle).add_(8).to(torch.uint8)
        lower, upper = q.view(-1, 2, 32, d_in).transpose(2, 3).unbind(1)  # (blocks, d_in, 32)
        weight = cls((lower | upper << 4).reshape(d_out, d_in // 2).contiguous(), False)
        weight.scales = torch.stack((step.T, middle.T), -1).to(torch.bfloat16)
        return weight

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        d_out, d_in = len(self), 2 * self.shape[1]
        wide = torch.promote_types(dtype, torch.float32)
        octets = self.data.view(-1, d_in, 32).transpose(1, 2).contiguous()
        q = torch.cat((octets & 15, octets >> 4), 1).view(d_out, -1, GROUP).to(wide)
        step, middle = self.scales.to(wide).permute(2, 1, 0).contiguous().unsqueeze(-1)
        return q.sub_(8).mul_(step).add_(middle).to(dtype).view(d_out, d_in)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if not _torch_reads_it():
            return linear(x, self.unpacked(x.dtype))
        return _torch_product(self, x)


def _grid(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and middles (d_out, groups), numbers of bfloat16, of `groups` (d_out, groups, 32)."""
    least, largest = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    step = _as_bfloat16((largest - least).clamp_(min=1e-30) / 15)
    middle = _as_bfloat16(least + 8 * step)
    mean = groups.mean(-1)
    for _ in range(TURNS):
        q = _nearest(groups, step, middle)
        q_mean = q.mean(-1)
        squares = linalg.vecdot(q, q) - GROUP * q_mean.square()
        fitted = (linalg.vecdot(q, groups) - GROUP * q_mean * mean) / squares
        step = torch.where((squares > 0.5) & (fitted > 0), _as_bfloat16(fitted), step)
        middle = _as_bfloat16(mean - step * q_mean)
    return step, middle


def _nearest(groups: torch.Tensor, step: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    q = (groups - middle.unsqueeze(-1)).div_(step.unsqueeze(-1))
    return q.round_().clamp_(-8, 7)


def _as_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def _torch_product(weight: Int4Weight, x: torch.Tensor) -> torch.Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, weight.data, GROUP, weight.scales.to(x.dtype))


@cache
def _torch_reads_it() -> bool:
    """Whether PyTorch's product reads integers that lie as here: tried, as processors differ."""
    numbers = torch.arange(3.0 * BLOCK * GROUP).mul_(0.7).sin_()
    weight = Int4Weight.of(numbers[: 2 * BLOCK * GROUP].view(BLOCK, 2 * GROUP))
    x = numbers[-2 * GROUP :].view(1, -1)
    try:
        found = _torch_product(weight, x)
    except (RuntimeError, AttributeError):
        return False
    return torch.allclose(found, linear(x, weight.unpacked(x.dtype)), rtol=0, atol=1e-4)
