"""LoftQ: the weight is quantised, and the adapter starts from what that loses.

Numbers are rounded as bitsandbytes stores them, and given back as numbers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorakit.errors import InputError
from lorakit.lora.init.decompose import checked, halves
from lorakit.lora.init.initialization import Factors, Initialization, InitSite, register

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


@dataclass(frozen=True)
class LoftQConfig:
    """The settings of LoftQ, with PEFT's names and defaults: bits (2, 4, 8) and iterations."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@torch.no_grad()
def loftq(
    W: torch.Tensor, r: int, bits: int, iterations: int, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A quantised weight and the factors that make up for it (LoftQ, Li et al. 2023).

    Two steps in turn, `iterations` times: `Q = quantised(W - B A)`, and `B A` the best
    approximation of `W - Q` of rank r (arXiv:2310.08659, algorithm 1). In 2 and 4 bits the values
    are NormalFloat in blocks, as `normal_float` says; in 8 bits whole numbers with a scale for
    each row, as `int8_rows` says: what bitsandbytes stores.

    Shapes: W (d_out, d_in) of any floating dtype.
    Args:
        bits: 2, 4 or 8.
        scaling: what the layer multiplies `B A` by, and the factors are divided by. PEFT leaves
            it out, so that its factors fit only where it is 1 (`lora_alpha = r`).
    Returns: the quantised weight as numbers again (d_out, d_in), A (r, d_in) and B (d_out, r), in
        float32 (float64 where `W` is), with `W ≈ W_quantized + scaling * B A`.
    Raises:
        InputError: `bits` or `iterations` are out of range, the rank is larger than `W` has, or
            `W` holds NaN or Inf.
    """
    if bits not in (2, 4, 8):
        raise InputError(f"loftq_bits must be 2, 4 or 8, not {bits!r}")
    if iterations < 1:
        raise InputError(f"loftq_iter must be at least 1, not {iterations!r}")
    W = checked(W, r, "LoftQ")
    rest = W
    for _ in range(iterations):
        quantized = int8_rows(rest) if bits == 8 else normal_float(rest, bits)
        U, S, Vh = torch.linalg.svd(W - quantized, full_matrices=False)
        A, B = halves(U[:, :r], S[:r], Vh[:r])
        rest = W - B @ A
    root = math.sqrt(scaling)
    return quantized, A / root, B / root


def _loftq(site: InitSite) -> Factors:
    bits, iterations = site.settings.loftq_bits, site.settings.loftq_iter
    quantized, A, B = loftq(site.W, site.r, bits, iterations, site.scaling)
    return Factors(A, B, quantized)


register(
    Initialization(
        value="loftq",
        make=_loftq,
        embedding=_loftq,
        settings=LoftQConfig,
        field="loftq_config",
        repeatable=True,
        changes_base=True,
    )
)
