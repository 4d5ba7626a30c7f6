"""Initialisations from the weight alone: PiSSA, OLoRA and MiCA; and orthogonal ones, from none.

Pure functions to factors `A` (r, d_in) and `B` (d_out, r), which are registered below.
"""

import torch

from lorakit.errors import InputError
from lorakit.lora.init.decompose import check_rank, checked, halves
from lorakit.lora.init.initialization import Factors, Initialization, InitSite, register

Pair = tuple[torch.Tensor, torch.Tensor]
"""`A` (r, d_in) and `B` (d_out, r)."""


@torch.no_grad()
def pissa(W: torch.Tensor, r: int, scaling: float, niter: int | None = None) -> Pair:
    """The principal part of the weight (PiSSA, Meng et al. 2024, arXiv:2404.02948).

    With `W = U S V^T`, `A = sqrt(S_r / scaling) V_r^T` and `B = U_r sqrt(S_r / scaling)`, so that
    `scaling * B A` is the best approximation of `W` of rank r.

    Shapes: W (d_out, d_in) of any floating dtype.
    Args:
        niter: subspace iterations of a randomised decomposition, which is much faster for a small
            rank and draws from PyTorch's generator; None decomposes exactly.
    Returns: A (r, d_in), B (d_out, r), in float32 (float64 where `W` is).
    Raises:
        InputError: the rank is larger than `W` has, or `W` holds NaN or Inf.
    """
    W = checked(W, r, "PiSSA")
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=niter)
        Vh = V.T
    return halves(U[:, :r], S[:r] / scaling, Vh[:r])


@torch.no_grad()
def olora(W: torch.Tensor, r: int) -> Pair:
    """The first columns of `W = Q R` (OLoRA, Büyükakyüz 2024, arXiv:2406.01775).

    `A = R[:r]` and `B = Q[:, :r]`, whose columns are orthonormal. The scaling has no part in it,
    as in PEFT: `scaling * B A` is `scaling` times the projection of `W`.

    Shapes: W (d_out, d_in) of any floating dtype.
    Returns: A (r, d_in), B (d_out, r), in float32 (float64 where `W` is).
    Raises:
        InputError: the rank is larger than `W` has, or `W` holds NaN or Inf.
    """
    Q, R = torch.linalg.qr(checked(W, r, "OLoRA"))
    return R[:r].contiguous(), Q[:, :r].contiguous()


@torch.no_grad()
def orthogonal(d_in: int, d_out: int, r: int) -> Pair:
    """Random factors, neither of them zero, whose product is zero.

    The rows of one random orthogonal matrix `Q` (r, r) alternate: `A` mixes the first,
    third, … and `B` the others, so that `B A = 0`
    (https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation).

    Draws from PyTorch's generator on the CPU, in PEFT's order.

    Returns: A (r, d_in), B (d_out, r), in PyTorch's default dtype.
    Raises:
        InputError: the rank is odd.
    """
    check_rank(r)
    if r % 2:
        raise InputError(f"orthogonal initialisation needs an even rank, not r={r}")
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A = (torch.randn(d_in, r // 2) @ Q[0::2]).T / 10
    B = torch.randn(r // 2, d_out).T @ Q[1::2] / 10
    return A.contiguous(), B.contiguous()


@torch.no_grad()
def mica(W: torch.Tensor, r: int) -> Pair:
    """Minor directions of the weight, which are kept, and a zero `A` (MiCA, arXiv:2604.01694).

    `B` is the left singular vectors of `W` for its r smallest singular values; only `A` is
    trained.

    Shapes: W (d_out, d_in). Returns: A (r, d_in), B (d_out, r), in float32 (float64 where `W` is).
    Raises:
        InputError: the rank is larger than `W` has, or `W` holds NaN or Inf.
    """
    W = checked(W, r, "MiCA")
    U, _, _ = torch.linalg.svd(W, full_matrices=False)
    return W.new_zeros(r, W.shape[1]), U[:, -r:].contiguous()


def _pissa(site: InitSite) -> Factors:
    _, _, niter = str(site.value).partition("pissa_niter_")
    return Factors(*pissa(site.W, site.r, site.scaling, int(niter) if niter else None))


def _mica(site: InitSite) -> Factors:
    return Factors(*mica(site.W, site.r))


register(
    # Orthogonal factors have a product of zero, and nothing to subtract.
    Initialization(
        value="orthogonal",
        make=lambda site: Factors(*orthogonal(site.W.shape[1], site.W.shape[0], site.r)),
    ),
    Initialization(value="pissa", make=_pissa, subtracted=True, repeatable=True),
    Initialization(
        value="pissa_niter_4", family=r"pissa_niter_[0-9]+", make=_pissa, subtracted=True
    ),
    Initialization(
        value="olora",
        make=lambda site: Factors(*olora(site.W, site.r)),
        subtracted=True,
        repeatable=True,
    ),
    Initialization(value="mica", make=_mica, embedding=_mica, trains_B=False),
)
