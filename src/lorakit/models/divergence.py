"""How far a student's next-token probabilities are from a teacher's, token by token, in nats.

Logits of 50,000 classes are the largest tensors of a pass, and here there are two of them: a chunk
of positions at a time becomes logits, a value and its gradient, as in `cross_entropy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lorakit.models.cross_entropy import CHUNK_ELEMENTS

Values = Callable[[torch.Tensor, slice], torch.Tensor]
"""Values (n,) or (n, k) of hidden states (n, d), which stand at a slice of all."""


class _Chunked(torch.autograd.Function):
    """`values(h[i])`, and their gradients by h, a chunk of positions at a time."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, values: Values, rows: int) -> torch.Tensor:
        found: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for at in range(0, len(h), rows):
            part = slice(at, at + rows)
            x = h[part].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                own = values(x, part)
                total = own.sum()
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(total, x)
            found.append(own.detach())
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.empty_like(h))
        return torch.cat(found) if found else h.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dh,) = ctx.saved_tensors
        return dh * grad[:, None].to(dh.dtype), None, None


def chunked(h: torch.Tensor, values: Values, classes: int) -> torch.Tensor:
    """`values` (n,) of hidden states h (n, d), without holding more logits than fit a chunk.

    Args:
        values: each depends on its own position alone; gradients reach `h` and nothing else.
        classes: the size V of the vocabulary.
    """
    return _Chunked.apply(h, values, max(1, CHUNK_ELEMENTS // classes))


def generalized_jsd(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, top_k: int | None = None
) -> torch.Tensor:
    """The generalised Jensen-Shannon divergence of two distributions (n,), in nats.

    `beta` KL(p_t | m) + (1 - beta) KL(p_s | m) with m = beta p_t + (1 - beta) p_s, and its limits:
    0 is the forward KL(p_t | p_s), 1 the reverse KL(p_s | p_t) (Agarwal et al. 2024,
    arXiv:2306.13649, in TRL's form of it).

    Args:
        student, teacher: logits (n, V), divided by the temperature.
        top_k: compare the teacher's so many likeliest classes, and all others as one class.
    """
    s, t = (F.log_softmax(z, dim=-1) for z in (student, teacher))
    if top_k is not None and top_k < t.shape[-1]:
        likeliest = t.topk(top_k, dim=-1).indices
        s, t = (_with_rest(x.gather(-1, likeliest)) for x in (s, t))
    if beta == 0:
        return _kl(t, s)
    if beta == 1:
        return _kl(s, t)
    m = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
    return beta * _kl(t, m) + (1 - beta) * _kl(s, m)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p | q) of log-probabilities (n, V)."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _with_rest(log_p: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (n, k) with one class more, which has the rest of the probability."""
    known = log_p.logsumexp(-1, keepdim=True)
    rest = torch.log(-torch.expm1(known.clamp(max=-torch.finfo(log_p.dtype).eps)))
    return torch.cat([log_p, rest], dim=-1)
