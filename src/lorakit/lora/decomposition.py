"""First values of an adapter that come from the weight it adapts, or from its shape alone.

Pure functions from tensors to factors `A` (r, d_in) and `B` (d_out, r), which change nothing and
know no layers. That the adapted model starts as the base is the caller's work: it takes
`scaling * B A` off again (PiSSA, OLoRA) or puts the quantised weight in the base's place (LoftQ).
"""

import math

import torch
import torch.nn.functional as F

from lorakit.errors import InputError

Factors = tuple[torch.Tensor, torch.Tensor]

_BLOCK = 64  # values that share one scale, as in bitsandbytes

# The largest probability whose quantile is a level of NormalFloat; QLoRA's code has this number.
_OUTERMOST = 0.9677083


@torch.no_grad()
def pissa(W: torch.Tensor, r: int, scaling: float, niter: int | None = None) -> Factors:
    """The principal part of the weight (PiSSA, Meng et al. 2024, arXiv:2404.02948).

    With `W = U S V^T`, `A = sqrt(S_r / scaling) V_r^T` and `B = U_r sqrt(S_r / scaling)`, so that
    `scaling * B A` is the best approximation of `W` of rank r.

    Shapes: W (d_out, d_in) of any floating dtype.
    Args:
        niter: subspace iterations of a randomised decomposition, which is much faster for a small
            rank and draws from PyTorch's generator; None decomposes exactly.
    Returns: A (r, d_in), B (d_out, r), in float32 (float64 where `W` is).
    Raises:
        InputError: the rank is larger than `W` has, or `W` holds something that is no number.
    """
    W = _checked(W, r, "PiSSA")
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=niter)
        Vh = V.T
    return _halves(U[:, :r], S[:r] / scaling, Vh[:r])


@torch.no_grad()
def olora(W: torch.Tensor, r: int, scaling: float) -> Factors:
    """The first columns of `W = Q R` (OLoRA, Büyükakyüz 2024, arXiv:2406.01775).

    `A = R[:r]` and `B = Q[:, :r]`, whose columns are orthonormal.

    Shapes: W (d_out, d_in) of any floating dtype.
    Args:
        scaling: has no part in it. The factors are those of the decomposition, as in PEFT, and
            what they make, `scaling * B A`, is `scaling` times the projection of `W`.
    Returns: A (r, d_in), B (d_out, r), in float32 (float64 where `W` is).
    Raises:
        InputError: the rank is larger than `W` has, or `W` holds something that is no number.
    """
    Q, R = torch.linalg.qr(_checked(W, r, "OLoRA"))
    return R[:r].contiguous(), Q[:, :r].contiguous()


@torch.no_grad()
def orthogonal(d_in: int, d_out: int, r: int) -> Factors:
    """Random factors, neither of them zero, whose product is zero.

    The rows of one random orthogonal matrix `Q` (r, r) are dealt out in turn: `A` mixes the first,
    third, … and `B` the others, so that `B A = 0`
    (https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation).

    Draws from PyTorch's generator on the CPU, in PEFT's order.

    Returns: A (r, d_in), B (d_out, r), in PyTorch's default dtype.
    Raises:
        InputError: the rank is odd.
    """
    _check_rank(r)
    if r % 2:
        raise InputError(f"orthogonal initialisation needs an even rank, not r={r}")
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A = (torch.randn(d_in, r // 2) @ Q[0::2]).T / 10
    B = torch.randn(r // 2, d_out).T @ Q[1::2] / 10
    return A.contiguous(), B.contiguous()


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
            `W` holds something that is no number.
    """
    if bits not in (2, 4, 8):
        raise InputError(f"loftq_bits must be 2, 4 or 8, not {bits!r}")
    if iterations < 1:
        raise InputError(f"loftq_iter must be at least 1, not {iterations!r}")
    W = _checked(W, r, "LoftQ")
    rest = W
    for _ in range(iterations):
        quantized = int8_rows(rest) if bits == 8 else normal_float(rest, bits)
        U, S, Vh = torch.linalg.svd(W - quantized, full_matrices=False)
        A, B = _halves(U[:, :r], S[:r], Vh[:r])
        rest = W - B @ A
    root = math.sqrt(scaling)
    return quantized, A / root, B / root


def normal_float_levels(bits: int) -> torch.Tensor:
    """The `2**bits` levels of NormalFloat in [-1, 1], ascending (2**bits,), float64.

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
    # linspace in float32: the published levels come from its roundings.
    probabilities = torch.linspace(_OUTERMOST, 0.5, n, dtype=torch.float32)[:-1]
    return torch.special.ndtri(probabilities.double())


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
    steps = torch.round(half * (127 / largest.clamp(min=torch.finfo(torch.float16).tiny)))
    return steps * largest / 127


def _halves(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> Factors:
    """`A` and `B` that share the singular values S (r,) of `U S Vh` evenly."""
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def _checked(W: torch.Tensor, r: int, method: str) -> torch.Tensor:
    """`W` in the dtype to compute in.

    Raises:
        InputError: it cannot be decomposed at this rank.
    """
    _check_rank(r)
    if W.dim() != 2 or not W.dtype.is_floating_point:
        shape, dtype = tuple(W.shape), str(W.dtype).removeprefix("torch.")
        raise InputError(f"{method} needs a matrix of floating numbers, not {shape} of {dtype}")
    if r > min(W.shape):
        raise InputError(
            f"{method}: r={r} is more than a weight of {W.shape[0]} x {W.shape[1]} has: "
            f"use r={min(W.shape)} or less"
        )
    if not W.isfinite().all():
        raise InputError(f"{method}: the base weight holds values that are infinite or no numbers")
    return W if W.dtype == torch.float64 else W.float()


def _check_rank(r: int) -> None:
    if r < 1:
        raise InputError(f"r must be at least 1, not {r}")
