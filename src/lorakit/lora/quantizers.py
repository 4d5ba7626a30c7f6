"""Numbers rounded as bitsandbytes stores them, and given back as numbers, for LoftQ."""

import torch
import torch.nn.functional as F

_BLOCK = 64  # values that share one scale, as in bitsandbytes

# The largest probability whose quantile is a level of NormalFloat; QLoRA's code has this number.
_OUTERMOST = 0.9677083


def normal_float_levels(bits: int) -> torch.Tensor:
    """The `2**bits` levels of NormalFloat in [-1, 1], ascending (2**bits,), float32.

    Quantiles of the normal distribution, one more of them above zero than below, and zero itself
    (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E).
    """
    half = 2 ** (bits - 1)
    above = _quantiles(half + 1)
    below = -_quantiles(half)
    levels = torch.cat([below, above.new_zeros(1), above.flip(0)])
    return levels / levels.max()


def _quantiles(n: int) -> torch.Tensor:
    """Normal quantiles of n evenly spaced probabilities from the outermost to 1/2, without it."""
    # In float32, of which the published levels have every rounding.
    probabilities = torch.linspace(_OUTERMOST, 0.5, n, dtype=torch.float32)[:-1]
    return torch.special.ndtri(probabilities.double()).float()


def normal_float(W: torch.Tensor, bits: int) -> torch.Tensor:
    """`W` with every value at the nearest level of NormalFloat, times its block's largest value.

    Blocks are 64 values in the order in which they are stored; the last may be shorter.

    Shapes: W (d_out, d_in), float32 or float64. Returns: the same shape and dtype.
    """
    levels = normal_float_levels(bits).to(device=W.device, dtype=W.dtype)
    values = W.flatten()
    blocks = F.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    relative = blocks / largest.clamp(min=torch.finfo(W.dtype).tiny)
    nearest = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * largest).flatten()[: len(values)].view_as(W)


def int8_rows(W: torch.Tensor) -> torch.Tensor:
    """`W` with every row at whole multiples of 1/127 of its largest value (LLM.int8).

    Values are rounded to float16 first, as bitsandbytes does (Dettmers et al. 2022,
    arXiv:2208.07339).

    Shapes: W (d_out, d_in), float32 or float64. Returns: the same shape and dtype.
    """
    half = W.half().to(W.dtype)
    largest = half.abs().amax(dim=1, keepdim=True)
    per_unit = torch.where(largest > 0, 127 / largest, 0)  # a row of zeros stays one
    return torch.round(half * per_unit) * largest * (1 / 127)
