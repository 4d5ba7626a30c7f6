"""Quantising to llama.cpp's Q4_K, Q5_K and Q6_K, which the `gguf` package only reads.

The formulas are those of `ggml/src/ggml-quants.c` (`quantize_row_q4_K_ref`, `make_qkx2_quants`,
`quantize_row_q6_K_ref`, `make_qx_quants`), for all blocks of a tensor at once. A block of 256
values has parts of 32 with a scale and a minimum each (Q4_K, Q5_K), or parts of 16 with a scale
(Q6_K); both are stored in few bits, and in one half-precision number for the block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gguf
import numpy as np
import torch

_BLOCK = 256
_AT_ONCE = 1 << 22
"""Values that are computed with together: the search holds several copies of them."""


def quantized(values: torch.Tensor, form: gguf.GGMLQuantizationType) -> np.ndarray:
    """`values` (…, d_in) in `form`, as the bytes (…, n) of its blocks.

    Raises ValueError where `d_in` is not a multiple of a block.
    """
    pack = _PACKERS.get(form)
    if pack is None:
        return gguf.quantize(values.float().contiguous().numpy(), form)
    if values.shape[-1] % _BLOCK:
        raise ValueError(f"{values.shape[-1]} is not a multiple of {_BLOCK}")
    blocks = values.reshape(-1, _BLOCK)
    with torch.no_grad():
        packed = [pack(part.float()) for part in blocks.split(_AT_ONCE // _BLOCK)]
    return torch.cat(packed).reshape(*values.shape[:-1], -1).numpy()


def _with_minimum(x: torch.Tensor, *, bits: int, low: float, steps: int) -> torch.Tensor:
    """Q4_K and Q5_K: `x ≈ d sc q - dmin m`, with `sc` and `m` of 6 bits for each 32 values."""
    most = (1 << bits) - 1
    parts = x.view(-1, 8, 32)
    weights = parts.abs() + parts.square().mean(-1, keepdim=True).sqrt()
    scales, minima = _fitted(parts, weights, most, low, steps)
    d, sc = _six_bits(scales)
    dmin, m = _six_bits(minima)
    step = (d.float() * sc).unsqueeze(-1)
    q = ((parts + (dmin.float() * m).unsqueeze(-1)) / step).round().clamp(0, most)
    q = torch.where(step == 0, torch.zeros_like(q), q).to(torch.uint8).view(-1, 4, 2, 32)
    sc, m = sc.to(torch.uint8), m.to(torch.uint8)
    first = [sc[:, :4] | sc[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6]
    header = [_bytes(d), _bytes(dmin), *first, sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4]
    if bits == 5:
        places = 2 * torch.arange(4).view(4, 1, 1) + torch.arange(2).view(2, 1)
        header.append(((q >> 4) << places).sum((1, 2)).to(torch.uint8))
    low_bits = q & 15
    return torch.cat((*header, (low_bits[:, :, 0] | low_bits[:, :, 1] << 4).flatten(1)), 1)


def _fitted(
    x: torch.Tensor, weights: torch.Tensor, most: int, low: float, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the minimum of each row of `x` (…, 32) with the least weighted error.

    For each of `steps` ways of rounding, least squares give the two (`make_qkx2_quants`).

    Returns: both (…,), not negative: `x ≈ scale · q - minimum`.
    """
    lowest, highest = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    span = highest - lowest
    highest = torch.where(span > 0, highest, lowest + 1)  # any, where all are the same
    sum_w, sum_x = weights.sum(-1, keepdim=True), (weights * x).sum(-1, keepdim=True)
    scale, minimum = (highest - lowest) / most, lowest
    q = ((x - lowest) / scale).round_().clamp_(0, most)
    error = (weights * (scale * q + minimum - x).square()).sum(-1, keepdim=True)
    for step in range(steps + 1):
        # From the best minimum so far on, as llama.cpp does.
        finer = (low + 0.1 * step + most) / (highest - minimum)
        q = (finer * (x - minimum)).round_().clamp_(0, most)
        wq = weights * q
        sum_q, sum_qq = wq.sum(-1, keepdim=True), (wq * q).sum(-1, keepdim=True)
        sum_xq = (wq * x).sum(-1, keepdim=True)
        determinant = sum_w * sum_qq - sum_q.square()
        new_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant
        new_minimum = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        above = new_minimum > 0
        new_scale = torch.where(above, sum_xq / sum_qq, new_scale)
        new_minimum = new_minimum.clamp(max=0)
        new_error = (weights * (new_scale * q + new_minimum - x).square()).sum(-1, keepdim=True)
        better = (determinant > 0) & (new_error < error)
        error = torch.where(better, new_error, error)
        scale = torch.where(better, new_scale, scale)
        minimum = torch.where(better, new_minimum, minimum)
    flat = span <= 0
    scale = torch.where(flat, torch.zeros_like(scale), scale)
    return scale.squeeze(-1), torch.where(flat, -lowest, -minimum).squeeze(-1)


def _six_bits(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`numbers` (blocks, 8) ≈ d · n: `d` (blocks, 1) in half precision and `n` from 0 to 63."""
    largest = numbers.amax(-1, keepdim=True).clamp(min=0)
    inverse = torch.where(largest > 0, 63 / largest, torch.zeros_like(largest))
    return (largest / 63).half(), (inverse * numbers).round().clamp(0, 63)


def _q6_k(x: torch.Tensor) -> torch.Tensor:
    """Q6_K: `x ≈ d sc (q - 32)`, with `sc` of 8 bits for each 16 values."""
    parts = x.view(-1, 16, 16)
    scales = _scales(parts, 32)
    at = scales.abs().argmax(-1, keepdim=True)
    largest = scales.gather(-1, at)
    none = largest.abs() < 1e-15
    inverse = torch.where(none, torch.zeros_like(largest), -128 / largest)
    d = torch.where(none, torch.zeros_like(largest), 1 / inverse).half()
    sc = (inverse * scales).round().clamp(max=127)
    step = (d.float() * sc).unsqueeze(-1)
    q = (parts / step).round().clamp(-32, 31)
    q = torch.where(step == 0, torch.zeros_like(q), q) + 32
    q = torch.where(none.unsqueeze(-1), torch.zeros_like(q), q)
    quarters = q.to(torch.uint8).view(-1, 2, 4, 32)
    low, high = quarters & 15, quarters >> 4
    ql = low[:, :, :2] | low[:, :, 2:] << 4
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat((ql.flatten(1), qh.flatten(1), _bytes(sc.to(torch.int8)), _bytes(d)), 1)


def _scales(x: torch.Tensor, most: int) -> torch.Tensor:
    """The scale of each row of `x` (…, 16) with the least error, weighted by `x²`.

    Of 19 ways of rounding to -most … most - 1, with least squares for each (`make_qx_quants`).
    """
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    none = extreme.abs() < 1e-15
    extreme = torch.where(none, torch.ones_like(extreme), extreme)
    weights = x.square()
    best = scale = torch.zeros_like(extreme)
    for step in (0, *range(-9, 0), *range(1, 10)):
        q = (x * (-(most + 0.1 * step) / extreme)).round_().clamp_(-most, most - 1)
        wq = weights * q
        sum_xq = (wq * x).sum(-1, keepdim=True)
        sum_qq = (wq * q).sum(-1, keepdim=True)
        new_scale = torch.where(sum_qq > 0, sum_xq / sum_qq, torch.zeros_like(sum_qq))
        better = new_scale * sum_xq > best
        best = torch.where(better, new_scale * sum_xq, best)
        scale = torch.where(better, new_scale, scale)
    return torch.where(none, torch.zeros_like(scale), scale).squeeze(-1)


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().view(torch.uint8)


_PACKERS: dict[gguf.GGMLQuantizationType, Callable[[torch.Tensor], torch.Tensor]] = {
    gguf.GGMLQuantizationType.Q4_K: partial(_with_minimum, bits=4, low=-1.0, steps=20),
    gguf.GGMLQuantizationType.Q5_K: partial(_with_minimum, bits=5, low=-0.5, steps=15),
    gguf.GGMLQuantizationType.Q6_K: _q6_k,
}
