"""Several adapters into one, module by module, on what they do: their updates ΔW.

An update is held as a product L R (d_out × n, n × d_in) as long as the method allows, so exact
methods stay exact and a truncated one costs a small SVD; `knots` aligns the updates' directions
that way. Methods that look at single entries (`ties`, `dare`, `magnitude_prune`) form the update
itself.

PEFT combines `A` and `B` apart from one another for all methods without `_svd` in their name,
which for `linear` gives cross terms between the adapters; that form is `linear_factors` here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorakit.errors import InputError, did_you_mean
from lorakit.lora.init.decompose import leading_directions

_CACHED = 1 << 15  # entries of one adapter


@dataclass(frozen=True)
class Update:
    """One adapter's part in a combination: `weight * scaling * B A`.

    Shapes: A (r, d_in), B (d_out, r). `full` (d_out, d_in) is the whole update where it is more
    than the product: DoRA's.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    weight: float
    full: torch.Tensor | None = None

    def delta(self) -> torch.Tensor:
        """The update without the weight: (d_out, d_in)."""
        return self.scaling * self.B @ self.A if self.full is None else self.full


@dataclass(frozen=True)
class Combined:
    """A combined update as factors whose scaling is 1, and what truncating it lost.

    `energy` is ‖ΔW‖² before truncation and `lost` what of it was cut off; both are 0 for methods
    that cut nothing off.
    """

    A: torch.Tensor
    B: torch.Tensor
    energy: float = 0.0
    lost: float = 0.0


@dataclass(frozen=True)
class CombineSettings:
    """How to combine; see `combine`."""

    method: str
    rank: int | None = None
    density: float | None = None
    majority_sign: str = "total"
    generator: torch.Generator | None = None


def combine(updates: Sequence[Update], settings: CombineSettings) -> Combined:
    """Combines one module's updates.

    Args:
        updates: one an adapter, at least one.
        settings: `method` is one of `METHODS`; `rank` is that of the result for methods that
            truncate (None: the largest among the adapters; for `knots`, and for `ties` and its
            like without `_svd`, the sum); `density` is the share of entries that are kept, in
            (0, 1]; `majority_sign` is `total` (by sum) or `frequency` (by count), for TIES and
            KnOTS; `generator` draws for DARE.

    Returns: factors A (n, d_in) and B (d_out, n) in the adapters' dtype, of scaling 1.

    Raises:
        InputError: the method is unknown, or its settings are missing or out of range.
    """
    check_settings(settings)
    if settings.method in ("cat", "linear", "linear_factors", "knots"):
        if any(u.full is not None for u in updates):
            raise InputError(
                f"{settings.method} is not defined for DoRA, whose updates have full rank: use svd"
            )
        if settings.method == "knots":
            L, R = _knots(updates, settings)
            return Combined(R, L) if settings.rank is None else truncate(L, R, settings.rank)
        return (_linear_factors if settings.method == "linear_factors" else _exact)(updates)
    ranks = [u.A.shape[0] for u in updates]
    rank = settings.rank or (max if settings.method.endswith("svd") else sum)(ranks)
    if settings.method == "svd":
        if any(u.full is not None for u in updates):
            return truncate_matrix(_weighted_sum((u.delta() for u in updates), updates), rank)
        exact = _exact(updates)
        return truncate(exact.B, exact.A, rank)
    keep, merge = _SPARSE[settings.method.removesuffix("_svd")]
    delta = merge((keep(u.delta(), settings) for u in updates), updates, settings.majority_sign)
    return truncate_matrix(delta, rank)


def truncate(L: torch.Tensor, R: torch.Tensor, rank: int) -> Combined:
    """The best approximation of `L R` of rank `rank`, by QR of both and a small SVD.

    Shapes: L (d_out, n), R (n, d_in). The work is in n, not in d_out × d_in.
    """
    left, l_small = torch.linalg.qr(L.double())
    right, r_small = torch.linalg.qr(R.double().T)
    U, S, Vh = torch.linalg.svd(l_small @ r_small.T, full_matrices=False)
    return _cut(left @ U, S, Vh @ right.T, rank, L.dtype)


def truncate_matrix(delta: torch.Tensor, rank: int) -> Combined:
    """The best approximation of `delta` (d_out, d_in) of rank `rank`.

    By SVD where `rank` is at least half of what `delta` can have. Below that by subspace iteration
    (`leading_directions`), which is many times faster and, of updates without a clear end to their
    singular values, loses some thousandths more than the best; `lost` is what it does lose.
    """
    if 2 * rank >= min(delta.shape):
        U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        return _cut(U, S, Vh, rank, delta.dtype)
    _, Vh = leading_directions(delta, rank)
    if not len(Vh):  # an update of zeros has no directions, and a rank still
        return Combined(delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(len(delta), rank))
    projected = delta @ Vh.T
    U, S, turned = torch.linalg.svd(projected.double(), full_matrices=False)
    found = _cut(U, S, turned @ Vh.double(), rank, delta.dtype)
    rest = torch.linalg.vector_norm(delta - projected @ Vh, dtype=torch.float64).square().item()
    return Combined(found.A, found.B, found.energy + rest, rest)


def check_settings(settings: CombineSettings) -> None:
    """Raises InputError for an unknown method, or a density or rank that it cannot take."""
    if settings.method not in METHODS:
        raise InputError(
            f"'{settings.method}' is not a way to combine adapters"
            f"{did_you_mean(settings.method, METHODS)}: there are {', '.join(METHODS)}"
        )
    trims = settings.method == "knots" or settings.method.removesuffix("_svd") in _SPARSE
    if trims and (settings.density is None or not 0 < settings.density <= 1):
        raise InputError(
            f"{settings.method} needs a density in (0, 1], the share of entries to keep, "
            f"not {settings.density}"
        )
    if settings.rank is not None and settings.rank < 1:
        raise InputError(f"the rank must be at least 1, not {settings.rank}")
    if settings.majority_sign not in ("total", "frequency"):
        raise InputError(
            f"the majority sign is by total or frequency, not {settings.majority_sign}"
        )


def _exact(updates: Sequence[Update]) -> Combined:
    """The weighted sum itself: the factors one after the other, of the ranks' sum."""
    A = torch.cat([u.A for u in updates])
    B = torch.cat([u.weight * u.scaling * u.B for u in updates], dim=1)
    return Combined(A, B)


def _linear_factors(updates: Sequence[Update]) -> Combined:
    """PEFT's `linear`: the factors are added up apart, each with the root of its weight.

    Raises:
        InputError: the ranks differ.
    """
    if len({u.A.shape[0] for u in updates}) > 1:
        raise InputError("linear_factors needs adapters of the same rank: use linear or svd")
    roots = [abs(u.weight * u.scaling) ** 0.5 for u in updates]
    signed = [root if u.weight > 0 else -root for root, u in zip(roots, updates, strict=True)]
    A = torch.stack([root * u.A for root, u in zip(signed, updates, strict=True)]).sum(0)
    B = torch.stack([root * u.B for root, u in zip(roots, updates, strict=True)]).sum(0)
    return Combined(A, B)


def _knots(
    updates: Sequence[Update], settings: CombineSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """KnOTS (Stoica et al. 2024, arXiv:2410.19735), with TIES as what merges the aligned parts.

    With `[ΔW_1 … ΔW_n] = U S [V_1 … V_n]` (side by side, each `V_i` (k, d_in)), all updates are
    told in the same output directions `U S`, and only the `V_i` are merged: `ΔW = U S V`. The
    decomposition is made of the factors alone, with matrices of the ranks' sum.

    Returns: `U S` (d_out, k) and `V` (k, d_in).
    """
    ranks = [u.A.shape[0] for u in updates]
    Q, small = torch.linalg.qr(torch.cat([u.scaling * u.B for u in updates], dim=1).double())
    parts = list(small.split(ranks, dim=1))
    lengths = [torch.linalg.qr(u.A.double().T, mode="r").R for u in updates]
    U, S, _ = torch.linalg.svd(
        torch.cat([part @ R.T for part, R in zip(parts, lengths, strict=True)], dim=1),
        full_matrices=False,
    )
    something = S.max() * torch.finfo(updates[0].A.dtype).eps * len(S) < S
    if not something.any():
        exact = _exact(updates)
        return exact.B, exact.A
    U, S = U[:, something], S[something]
    V = [U.T @ part @ u.A.double() / S[:, None] for part, u in zip(parts, updates, strict=True)]
    merged = _elected((_largest(v, settings) for v in V), updates, settings.majority_sign)
    dtype = updates[0].A.dtype
    return (Q @ U * S).to(dtype), merged.to(dtype)


def _weighted_sum(
    deltas: Iterable[torch.Tensor], updates: Sequence[Update], majority_sign: str = ""
) -> torch.Tensor:
    """One matrix after the other, so that only two are held."""
    total = torch.zeros(())
    for delta, update in zip(deltas, updates, strict=True):
        total = total.to(delta) + update.weight * delta
    return total


def _elected(
    deltas: Iterable[torch.Tensor], updates: Sequence[Update], majority_sign: str
) -> torch.Tensor:
    """The mean of the weighted entries that have the elected sign.

    A few rows at a time: what is computed on the way stays in the processor's cache.
    """
    all_deltas = list(deltas)
    elected = torch.empty_like(all_deltas[0])
    by_sum = majority_sign == "total"
    step = max(1, _CACHED // elected.shape[1])
    for at in range(0, len(elected), step):
        parts = torch.stack([delta[at : at + step] for delta in all_deltas])
        for part, update in zip(parts, updates, strict=True):
            part *= update.weight
        votes = parts.sum(0) if by_sum else parts.sign().sum(0)
        # Turned so that what agrees is above 0, and back.
        sign = torch.where(votes >= 0, 1.0, -1.0).to(parts)
        parts.mul_(sign).clamp_(min=0)
        count = parts.count_nonzero(0).clamp_(min=1)
        elected[at : at + step] = parts.sum(0).div_(count).mul_(sign)
    return elected


def _largest(delta: torch.Tensor, settings: CombineSettings) -> torch.Tensor:
    """`delta` with all but the share `density` of its largest entries set to zero."""
    assert settings.density is not None
    keep = max(1, round(settings.density * delta.numel()))
    if keep == delta.numel():
        return delta
    sizes = delta.abs().flatten()
    if sizes.device.type == "cpu" and sizes.dtype in (torch.float32, torch.float64):
        # Ten times as fast as `topk`, which sorts what it finds.
        least = np.partition(sizes.numpy(), len(sizes) - keep)[len(sizes) - keep].item()
    else:
        least = sizes.topk(keep).values.min().item()
    return delta * (sizes.view_as(delta) >= least)


def _dropped(delta: torch.Tensor, settings: CombineSettings) -> torch.Tensor:
    """`delta` with entries kept with probability `density`, scaled so that its mean stays."""
    assert settings.density is not None
    # NumPy draws ten times as fast as PyTorch; the seed is the generator's.
    seed = int(torch.randint(2**62, (1,), generator=settings.generator))
    drawn = np.random.Generator(np.random.SFC64(seed)).random(delta.shape, dtype=np.float32)
    kept = torch.from_numpy(drawn < settings.density).to(delta.device)
    return delta * kept / settings.density


def _cut(
    U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, rank: int, dtype: torch.dtype
) -> Combined:
    energy = S.square()
    root = S[:rank].sqrt()  # shared between the factors, so that neither is far from 1
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return Combined(
        A.to(dtype).contiguous(),
        B.to(dtype).contiguous(),
        energy.sum().item(),
        energy[rank:].sum().item(),
    )


_SPARSE: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "ties": (_largest, _elected),
    "dare_linear": (_dropped, _weighted_sum),
    "dare_ties": (_dropped, _elected),
    "magnitude_prune": (_largest, _weighted_sum),
}
"""Which entries of an update are kept, and how the updates are put together.

TIES (Yadav et al. 2023, arXiv:2306.01708) trims, elects a sign for each entry and takes the mean of
the entries that agree; DARE (Yu et al. 2023, arXiv:2311.03099) drops entries at random and scales
up the others.
"""

METHODS = (
    "linear",
    "cat",
    "svd",
    "linear_factors",
    "knots",
    *_SPARSE,
    *(f"{name}_svd" for name in _SPARSE),
)
"""The methods of `combine`."""
