"""DoRA: the length of every output channel's weight is trained apart from its direction.

`W' = m * (W + scaling * B A) / ‖W + scaling * B A‖`, a norm for each output channel (Liu et al.
2024, arXiv:2402.09353). The norm takes part as a constant, section 4.3 of the paper.
"""

import torch
from torch import nn


class Magnitude(nn.Module):
    """The trained lengths `m`, of shape (d_out,) or what broadcasts to a layer's output."""

    def __init__(self, lengths: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(lengths.detach().clone())


@torch.no_grad()
def channel_norms(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`‖W + scaling * B A‖` of every output channel, without forming the sum.

    From `‖w + b A‖² = ‖w‖² + 2 b (A w) + b (A Aᵀ) bᵀ`, so the cost is that of a product with A.
    At a start with `B = 0` the result is exactly `‖W‖`, and the layer exactly its base.

    Shapes: W (d_out, d_in), A (r, d_in), B (d_out, r). Returns (d_out,) in A's dtype.
    """
    squares = torch.linalg.vector_norm(W, dim=1, dtype=A.dtype).square()
    scaled = B * scaling
    WA = (W @ A.to(W.dtype).T).to(A.dtype)
    squares += (scaled * (2 * WA + scaled @ (A @ A.T))).sum(dim=1)
    # Rounding can take a norm of nearly zero below it.
    return squares.clamp_(min=torch.finfo(A.dtype).tiny).sqrt_()
