"""Decompositions that several initialisations, and the combination of adapters, are made of.

Pure functions of matrices, which they check first and do not change.
"""

import torch

from lorakit.errors import InputError


def leading_directions(X: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest singular values of X (n, d) and right singular vectors (k, d), signs fixed.

    By subspace iteration (Halko et al. 2009, arXiv:0909.4061, algorithms 4.4 and 5.1) with the
    numbers of PEFT's: twice as many directions, four iterations, seed 42. Exact where that would
    be all there are. Directions in which X has nothing are left out.
    """
    if 2 * k >= min(X.shape):
        _, S, Vh = torch.linalg.svd(X, full_matrices=False)
    else:
        tall = X if X.shape[0] >= X.shape[1] else X.T
        start = torch.Generator(X.device).manual_seed(42)
        size = tall.shape[1], 2 * k
        Q = torch.randn(size, generator=start, dtype=X.dtype, device=X.device)
        Q = torch.linalg.qr(tall @ Q).Q
        for _ in range(4):
            Q = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ Q).Q).Q
        U, S, Vh = torch.linalg.svd(Q.T @ tall, full_matrices=False)
        Vh = Vh if tall is X else (Q @ U).T
    S, Vh = S[:k], Vh[:k]
    something = S.max() * torch.finfo(S.dtype).eps * max(X.shape) < S
    S, Vh = S[something], Vh[something]
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    return S, Vh * largest.sign()


def checked(W: torch.Tensor, r: int, method: str) -> torch.Tensor:
    """`W` in the dtype to compute in; InputError where it has no decomposition of rank r."""
    check_rank(r)
    if W.dim() != 2 or not W.dtype.is_floating_point:
        shape, dtype = tuple(W.shape), str(W.dtype).removeprefix("torch.")
        raise InputError(f"{method} needs a matrix of floating numbers, not {shape} of {dtype}")
    if r > min(W.shape):
        raise InputError(
            f"{method}: r={r} is more than a matrix of {W.shape[0]} x {W.shape[1]} has: "
            f"use r={min(W.shape)} or less"
        )
    if not W.isfinite().all():
        raise InputError(f"{method}: the matrix holds NaN or Inf")
    return at_least_float32(W)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype to compute in: float64 where it is, float32 otherwise."""
    return x if x.dtype == torch.float64 else x.float()


def halves(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`A` and `B` that share the singular values S (r,) of `U S Vh` evenly."""
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def check_rank(r: int) -> None:
    if r < 1:
        raise InputError(f"r must be at least 1, not {r}")
