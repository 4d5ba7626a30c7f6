"""First values of an adapter that are a part of a matrix: of the weight, or of its gradient.

Pure functions from tensors to factors `A` (r, d_in) and `B` (d_out, r), which change nothing and
know no layers; what they need from data is collected in `data_driven.py`. That the adapted model
starts as the base is the caller's work: it takes `scaling * B A` off again (PiSSA, OLoRA, CorDA,
LoRA-GA) or puts the quantised weight in the base's place (LoftQ).
"""

import itertools
import math
from typing import Literal

import torch

from lorakit.errors import InputError, listed
from lorakit.lora.quantizers import int8_rows, normal_float

Factors = tuple[torch.Tensor, torch.Tensor]


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
    W = checked(W, r, "PiSSA")
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
    Q, R = torch.linalg.qr(checked(W, r, "OLoRA"))
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
def mica(W: torch.Tensor, r: int) -> Factors:
    """Minor directions of the weight, which are kept, and a zero `A` (MiCA, arXiv:2604.01694).

    `B` is the left singular vectors of `W` for its r smallest singular values; only `A` is
    trained.

    Shapes: W (d_out, d_in). Returns: A (r, d_in), B (d_out, r), in float32 (float64 where `W` is).
    Raises:
        InputError: the rank is larger than `W` has, or `W` holds something that is no number.
    """
    W = checked(W, r, "MiCA")
    U, _, _ = torch.linalg.svd(W, full_matrices=False)
    return W.new_zeros(r, W.shape[1]), U[:, -r:].contiguous()


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
    W = checked(W, r, "LoftQ")
    rest = W
    for _ in range(iterations):
        quantized = int8_rows(rest) if bits == 8 else normal_float(rest, bits)
        U, S, Vh = torch.linalg.svd(W - quantized, full_matrices=False)
        A, B = _halves(U[:, :r], S[:r], Vh[:r])
        rest = W - B @ A
    root = math.sqrt(scaling)
    return quantized, A / root, B / root


@torch.no_grad()
def corda(
    W: torch.Tensor,
    covariance: torch.Tensor,
    r: int,
    scaling: float,
    method: Literal["ipm", "kpm"] = "ipm",
) -> Factors:
    """A part of the weight as the data sees it (CorDA, Yang et al. 2024, arXiv:2406.05223).

    With `W C = U S V^T`, `scaling * B A = U_r S_r V_r^T C^-1`: of the r largest singular values
    for `ipm` (the instruction-previewed mode, the fastest to learn the data's task), of the r
    smallest for `kpm` (the knowledge-preserved mode, which leaves alone what the data shows).

    Shapes: W (d_out, d_in), covariance C (d_in, d_in). Returns: A (r, d_in), B (d_out, r), in
        float32 (float64 where `W` is).
    Raises:
        InputError: the rank is larger than `W` has, `W` or C hold what is no number, C is zero.
    """
    if method not in ("ipm", "kpm"):
        raise InputError(f"corda_method must be ipm or kpm, not {method!r}")
    W = checked(W, r, "CorDA")
    C = covariance.to(W)
    level = C.diagonal().mean()
    if not C.isfinite().all() or level <= 0:
        raise InputError("CorDA: the covariance of a module's inputs is zero or no number")
    one = torch.eye(len(C), dtype=C.dtype, device=C.device)
    for doublings in itertools.count():
        damped = C + 0.01 * 2**doublings * level * one
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < 0.05:
            break
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    part = slice(r) if method == "ipm" else slice(len(S) - r, len(S))
    root = (S[part] / scaling).sqrt()
    return root[:, None] * (Vh[part] @ inverse), U[:, part] * root


@torch.no_grad()
def lora_ga(
    gradient: torch.Tensor,
    W: torch.Tensor,
    r: int,
    scaling: float,
    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r",
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable",
    stable_gamma: float = 16,
) -> Factors:
    """Directions of the weight's gradient, so that the first step of the adapter is close to the
    first step of full training (LoRA-GA, Wang et al. 2024, arXiv:2407.05000).

    Of the gradient's first 2r singular triples, `A` gets right vectors and `B` left vectors times
    their singular values. Draws from PyTorch's generator, in PEFT's order.

    Shapes: gradient and W (d_out, d_in). Returns: A (r, d_in), B (d_out, r), in float32 (float64
        where the gradient is).
    Args:
        direction: which of the triples go where: `ArB2r` the first r to `A` and the others to
            `B`, `A2rBr` the other way round, `ArBr` in turn (the first to `B`), `random` the same
            r of them, drawn, to both.
        scale: `stable` multiplies `B` by `d_out^(1/4) / sqrt(stable_gamma)`, `weight_svd` brings
            its largest singular value to that of `W`, `gd_scale` divides both by `scaling`.
    Raises:
        InputError: an unknown name, 2r is more than the gradient has, or it is no number.
    """
    directions = ("ArBr", "A2rBr", "ArB2r", "random")
    if direction not in directions:
        raise InputError(f"lora_ga direction must be one of {listed(directions)}: {direction!r}")
    scales = ("stable", "weight_svd", "gd_scale", "unit")
    if scale not in scales:
        raise InputError(f"lora_ga scale must be one of {listed(scales)}, not {scale!r}")
    if not stable_gamma > 0:
        raise InputError(f"lora_ga stable_gamma must be above 0, not {stable_gamma!r}")
    if 2 * r > min(gradient.shape):
        raise InputError(
            f"LoRA-GA takes 2r directions of a gradient, and one of {gradient.shape[0]} x "
            f"{gradient.shape[1]} has fewer than {2 * r}: use r={min(gradient.shape) // 2} or less"
        )
    G = checked(gradient, r, "LoRA-GA")
    U, S, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
    for_A, for_B = _triples(direction, r)
    A, B = V.T[for_A], U[:, for_B] * S[for_B]
    if scale == "stable":
        B = B * (len(G) ** 0.25 / stable_gamma**0.5)
    elif scale == "weight_svd":
        _, weight_S, _ = torch.svd_lowrank(W.to(G.dtype), q=r, niter=4)
        largest = S[for_B][0]
        B = B * (weight_S[0] / largest) if largest > 0 else B
    elif scale == "gd_scale":
        A, B = A / scaling, B / scaling
    return A.contiguous(), B.contiguous()


def _triples(direction: str, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of 2r singular triples are for `A` and which for `B`, r of them each."""
    all_of_them = torch.arange(2 * r)
    if direction == "ArBr":
        return all_of_them[1::2], all_of_them[0::2]
    if direction == "A2rBr":
        return all_of_them[r:], all_of_them[:r]
    if direction == "ArB2r":
        return all_of_them[:r], all_of_them[r:]
    drawn = torch.randperm(2 * r)[:r]
    return drawn, drawn


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


def _halves(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> Factors:
    """`A` and `B` that share the singular values S (r,) of `U S Vh` evenly."""
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def checked(W: torch.Tensor, r: int, method: str) -> torch.Tensor:
    """`W` in the dtype to compute in; InputError where it has no decomposition of rank r."""
    _check_rank(r)
    if W.dim() != 2 or not W.dtype.is_floating_point:
        shape, dtype = tuple(W.shape), str(W.dtype).removeprefix("torch.")
        raise InputError(f"{method} needs a matrix of floating numbers, not {shape} of {dtype}")
    if r > min(W.shape):
        raise InputError(
            f"{method}: r={r} is more than a matrix of {W.shape[0]} x {W.shape[1]} has: "
            f"use r={min(W.shape)} or less"
        )
    if not W.isfinite().all():
        raise InputError(f"{method}: the matrix holds values that are infinite or no numbers")
    return at_least_float32(W)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype to compute in: float64 where it is, float32 otherwise."""
    return x if x.dtype == torch.float64 else x.float()


def _check_rank(r: int) -> None:
    if r < 1:
        raise InputError(f"r must be at least 1, not {r}")
