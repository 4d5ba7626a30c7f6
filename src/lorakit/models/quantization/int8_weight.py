"""Weights of 8 bits: integers with a scale for each output channel.

`W ≈ s · q` with `q = round(W / s)` in [-127, 127] and `s` (d_out,) a row's largest magnitude by 127
(absmax rounding, as in Dettmers et al. 2022, arXiv:2208.07339, of the weights alone). Scales are
rounded up to bfloat16 before, so that the same weights are meant in every dtype.
"""

from __future__ import annotations

import torch

from lorakit.models.quantization.rounded_linear import RoundedWeight


class Int8Weight(RoundedWeight):
    """The integers (d_out, d_in) of int8, and scales (d_out,)."""

    form = "int8"
    in_a_byte = 1
    few_tokens = 32

    @classmethod
    def of(cls, W: torch.Tensor) -> Int8Weight:
        wide = W.detach().float()
        exact = wide.abs().amax(1).clamp_(min=1e-30) / 127
        scales = exact.to(torch.bfloat16)
        up = torch.nextafter(scales, torch.full_like(scales, torch.inf))
        scales = torch.where(scales.float() < exact, up, scales)
        weight = cls(wide.div(scales.float()[:, None]).round_().to(torch.int8), False)
        weight.scales = scales
        return weight

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return self.data.to(wide).mul_(self.scales.to(wide)[:, None]).to(dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x, self.data, self.scales.to(x.dtype))
