"""The fused product of a frozen linear layer and a low-rank adapter, or several side by side.

Written as one autograd function because PyTorch's graph of the same formula keeps and moves
more than is needed: here the low-rank product is accumulated into the base's output, and only
`x` and `x A^T` are kept for the backward pass (with dropout one byte an entry of `x` more).
A quantised weight is given as a function that unpacks it, which each pass calls for itself, so
that no unpacked weight outlives its product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

Weight = torch.Tensor | Callable[[], torch.Tensor]
"""A frozen weight (d_out, d_in), or what gives it in the dtype of the products."""


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
        W: Weight,
        b: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, unpacked(W), b)
        xA, mask = add_update(y, rows, A, B, scaling, p)
        ctx.save_for_backward(x, xA, *keep_weight(ctx, W), A, B, mask)
        ctx.scaling, ctx.kept = scaling, 1 - p
        return shaped_as(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, xA, W, A, B, mask = ctx.saved_tensors
        G = grad.reshape(-1, grad.shape[-1])
        dx = G @ kept_weight(ctx, W) if ctx.needs_input_grad[0] else None
        rows = x.reshape(-1, x.shape[-1])
        needed = ctx.needs_input_grad[3:5]
        dA, dB = gradients(dx, G, rows, xA, A, B, mask, ctx.scaling, ctx.kept, needed)
        return None if dx is None else dx.view(x.shape), None, None, dA, dB, None, None


def shaped_as(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`y` (n, d_out) in the shape of x (..., d_in): (..., d_out).

    Not as a view: autograd forbids a model to change a view of a custom function's output in place.
    """
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def unpacked(W: Weight) -> torch.Tensor:
    """The weight itself, for one product."""
    return W if isinstance(W, torch.Tensor) else W()


def keep_weight(ctx: Any, W: Weight) -> tuple[torch.Tensor | None]:
    """What of `W` is saved for the backward pass: a tensor as all of them are, or its function."""
    if isinstance(W, torch.Tensor):
        return (W,)
    ctx.unpack = W
    return (None,)


def kept_weight(ctx: Any, W: torch.Tensor | None) -> torch.Tensor:
    """The weight of which `keep_weight` has saved this."""
    return ctx.unpack() if W is None else W


def add_update(
    y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, p: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adds an adapter's update of `x` (n, d_in) to `y` (n, d_out), in place.

    Returns: x' A^T (n, r), and what was kept by dropout (n, d_in).
    """
    mask = None
    if p > 0:
        x, mask = torch.native_dropout(x, p, True)
    xA = x @ A.to(x.dtype).T
    y.addmm_(xA, B.to(x.dtype).T, alpha=scaling)
    return xA, mask


def gradients(
    dx: torch.Tensor | None,
    G: torch.Tensor,
    x: torch.Tensor,
    xA: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    kept: float,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dA and dB, those that are `needed`; what the adapter adds to `dx` is added in place."""
    GB = (G @ B.to(G.dtype)).mul_(scaling)  # (n, r)
    dA = dB = None
    if needed[0]:
        seen = x if mask is None else (x * mask).div_(kept)
        dA = (GB.T @ seen).to(A.dtype)
    if needed[1]:
        # The narrow factor first: a CPU takes half the time or less for the same numbers.
        dB = (xA.T @ G).T.mul(scaling).to(B.dtype)
    if dx is not None:
        if mask is None:
            dx.addmm_(GB, A.to(G.dtype))
        else:
            dx.addcmul_(GB @ A.to(G.dtype), mask.to(G.dtype), value=1 / kept)
    return dA, dB


def lora_linear(
    x: torch.Tensor,
    W: Weight,
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
