"""What an adapter adds to a weight, and adding it some rows at a time.

A merge file by file and one in memory are both made of it (`adapters/streaming.py`, `layer.py`),
so that both give the same bytes.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

RowUpdate = Callable[[torch.Tensor, torch.Tensor, slice], object]
"""Adds an update, in place, to a sum over some rows of a stored weight.

It takes the sum, the rows as they are stored, and where they lie.
"""

_BLOCK = 1 << 19  # values at a time: few enough for the processor's last cache


@torch.no_grad()
def channel_norms(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`‖W + scaling * B A‖` of every output channel, without forming the sum, for DoRA.

    DoRA trains the magnitude of every channel apart from its direction:
    `W' = m * (W + scaling * B A) / ‖W + scaling * B A‖` (Liu et al. 2024, arXiv:2402.09353), the
    norm being a constant (its section 4.3). From `‖w + b A‖² = ‖w‖² + 2 b (A w) + b (A Aᵀ) bᵀ`
    the cost is that of a product with A. With `B = 0` the result is exactly `‖W‖`.

    Shapes: W (d_out, d_in), A (r, d_in), B (d_out, r). Returns (d_out,) in A's dtype.
    """
    squares = torch.linalg.vector_norm(W, dim=1, dtype=A.dtype).square()
    scaled = B * scaling
    WA = (W @ A.to(W.dtype).T).to(A.dtype)
    squares += (scaled * (2 * WA + scaled @ (A @ A.T))).sum(dim=1)
    # Rounding can take a norm of nearly zero below it.
    return squares.clamp_(min=torch.finfo(A.dtype).tiny).sqrt_()


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """The rows of a stored weight of this shape, about 2**19 values at a time."""
    rows, width = shape[0], math.prod(shape[1:])
    step = max(1, _BLOCK // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def merged_rows(
    W: torch.Tensor, rows: slice, updates: Sequence[RowUpdate], dtype: torch.dtype
) -> torch.Tensor:
    """Rows `W` of a stored weight with all updates added to them, in `dtype`, not yet rounded."""
    total = W.to(dtype, copy=True)
    for update in updates:
        update(total, W, rows)
    return total


def in_part(W: torch.Tensor, V: torch.Tensor, share: float) -> torch.Tensor:
    """`W + share (V - W)` of a base's tensor `W` that was trained whole, to `V`; 1 is `V` itself.

    Every operation is rounded by itself, so that parts of tensors have the bytes of whole ones.
    """
    if share == 1 or not V.is_floating_point():
        return V.clone()
    return (V - W).mul_(share).add_(W)


def product_rows(A: torch.Tensor, B: torch.Tensor, scaling: float) -> RowUpdate:
    """`scaling * B A`, A (r, d_in), B (d_out, r), for a weight (d_out, d_in) or a convolution's."""
    scaled = B * scaling
    return lambda total, _, rows: total.flatten(1).addmm_(scaled[rows], A)


def transposed_rows(A: torch.Tensor, B: torch.Tensor, scaling: float) -> RowUpdate:
    """The same for a weight that is stored as (d_in, d_out)."""
    scaled = B * scaling
    return lambda total, _, rows: total.addmm_(A[:, rows].T, scaled.T)


def dora_rows(
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor,
    share: float,
    as_matrix: Callable[[torch.Tensor], torch.Tensor],
) -> RowUpdate:
    """DoRA: `m (W + scaling B A) / ‖…‖ - W`.

    Args:
        magnitude: m (d_out,).
        share: what the update is multiplied by.
        as_matrix: the stored rows as (rows, d_in).
    """
    scaled = B * scaling

    def add(total: torch.Tensor, W: torch.Tensor, rows: slice) -> None:
        # A copy: on some processors a product's last bits depend on where its factors lie.
        matrix = as_matrix(W.to(A.dtype, copy=True))
        norms = channel_norms(matrix, A, B[rows], scaling)
        turned = matrix + scaled[rows] @ A
        update = (magnitude[rows] / norms)[:, None] * turned - matrix
        total.add_(update.mul_(share).view_as(total))

    return add
