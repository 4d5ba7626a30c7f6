"""Small integers and floating point of 4 bits, as packed words and bytes hold them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of floating point of 4 bits (OCP Microscaling Formats 1.0, table 5)."""


def integers(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The unsigned integers in words of 32 bits, the lowest bits first.

    They lie close together: 32 integers take `bits` words, whatever `bits` is.

    Args:
        words: (…, n) of int32.
        bits: of each integer, 1 to 8.
        count: how many integers a row has; the rest of its last words is not used.

    Returns: (…, count) of uint8.
    """
    import torch
    import torch.nn.functional as F

    rows = words.shape[:-1]
    if bits in (4, 8):
        octets = words.contiguous().view(torch.uint8)
        if bits == 4:
            octets = torch.stack((octets & 15, octets >> 4), -1).flatten(-2)
        return octets[..., :count]
    lacking = -words.shape[-1] % bits
    groups = F.pad(words, (0, lacking)).view(*rows, -1, bits).long() & 0xFFFFFFFF
    groups = F.pad(groups, (0, 1))  # so that each word has a next one
    begin = torch.arange(0, 32 * bits, bits, device=words.device)
    at, shift = begin // 32, begin % 32
    pairs = groups[..., at] | (groups[..., at + 1] << 32)
    values = (pairs >> shift) & ((1 << bits) - 1)
    return values.flatten(-2)[..., :count].to(torch.uint8)


def floats(octets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The floating point numbers of 4 bits (E2M1), two in a byte, the lower four bits first.

    Args:
        octets: (…, n) of uint8.

    Returns: (…, 2 n) of `dtype`.
    """
    import torch

    return _looked_up(torch.stack((octets & 15, octets >> 4), -1).flatten(-2), None, dtype)


def numbers(octets: torch.Tensor, stored: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of 8 bits as `dtype`.

    Args:
        octets: their bytes, of `stored` or of uint8.
        stored: what they are: int8 or a float8, which a processor converts five times as fast by
            a table as by `to`.
    """
    import torch

    if stored.is_floating_point:
        return _looked_up(octets.view(torch.uint8), stored, dtype)
    return octets.view(stored).to(dtype)


def _looked_up(
    octets: torch.Tensor, stored: torch.dtype | None, dtype: torch.dtype
) -> torch.Tensor:
    table = _table(stored, dtype, str(octets.device))
    return table.index_select(0, octets.reshape(-1).int()).view(octets.shape)


@cache
def _table(stored: torch.dtype | None, dtype: torch.dtype, device: str) -> torch.Tensor:
    """What each byte stands for: as `stored`, or as E2M1 for None."""
    import torch

    if stored is None:
        return torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=dtype, device=device)
    return torch.arange(256, dtype=torch.uint8).view(stored).to(dtype).to(device)


def powers_of_two(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`2 ** (e - 127)`: scales that are exponents alone (E8M0), of uint8."""
    import torch

    return torch.ldexp(torch.ones_like(exponents, dtype=dtype), exponents.int() - 127)
