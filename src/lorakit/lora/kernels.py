"""The fused product of a frozen linear layer and one low-rank adapter.

Written as one autograd function because PyTorch's graph of the same formula keeps and moves
more than is needed: here the low-rank product is accumulated into the base's output, and only
`x` and `x A^T` are kept for the backward pass (with dropout one byte an entry of `x` more).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class LoraLinearFunction(torch.autograd.Function):
    """`y = x W^T + b + scaling * (drop(x) A^T) B^T`, with gradients for `x`, `A` and `B` alone.

    Shapes: x (..., d_in), W (d_out, d_in), b (d_out,) or None, A (r, d_in), B (d_out, r).
    The products run in x's dtype; the gradients of `A` and `B` have the dtype of `A` and `B`.
    With G = dL/dy and x' = drop(x): dB = s G^T (x' A^T), dA = s (G B)^T x', and
    dx = G W + drop'(s (G B) A), where drop' is the same mask as in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, W, b)
        mask = None
        if p > 0:
            rows, mask = torch.native_dropout(rows, p, True)
        xA = rows @ A.to(x.dtype).T
        y.addmm_(xA, B.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, xA, W, A, B, mask)
        ctx.scaling, ctx.kept = scaling, 1 - p
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, xA, W, A, B, mask = ctx.saved_tensors
        G = grad.reshape(-1, grad.shape[-1])
        GB = (G @ B.to(G.dtype)).mul_(ctx.scaling)  # (N, r)
        dA = dB = dx = None
        if ctx.needs_input_grad[3]:
            rows = x.reshape(-1, x.shape[-1])
            if mask is not None:
                rows = (rows * mask).div_(ctx.kept)
            dA = (GB.T @ rows).to(A.dtype)
        if ctx.needs_input_grad[4]:
            # The narrow factor first: a CPU takes half the time or less for the same numbers.
            dB = (xA.T @ G).T.mul(ctx.scaling).to(B.dtype)
        if ctx.needs_input_grad[0]:
            dx = G @ W
            if mask is None:
                dx.addmm_(GB, A.to(G.dtype))
            else:
                dx.addcmul_(GB @ A.to(G.dtype), mask.to(G.dtype), value=1 / ctx.kept)
            dx = dx.view(x.shape)
        return dx, None, None, dA, dB, None, None


def lora_linear(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    p: float = 0.0,
) -> torch.Tensor:
    """`x W^T + b + scaling * (drop(x) A^T) B^T` for a frozen `W` and `b`.

    Args:
        p: the share of x's entries that the adapter does not see, drawn anew in every call.

    Shapes as in `LoraLinearFunction`. Returns (..., d_out) in x's dtype.
    """
    return LoraLinearFunction.apply(x, W, b, A, B, scaling, p)
