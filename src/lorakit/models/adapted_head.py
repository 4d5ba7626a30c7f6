"""Cross-entropy behind an output layer with adapters, without ever holding all logits.

Beside the frozen `h Wᵀ + b` each span of positions has low-rank updates of its own, so that rows of
several adapters, of any ranks, take one product with the vocabulary's matrix. A position may have
several targets. The forward pass keeps no logits: the backward pass computes again those that have
a gradient, a chunk at a time (`cross_entropy.py` has the faster form for a frozen head).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lorakit.lora.kernels import gradients
from lorakit.lora.layers.linear import LoraLinear
from lorakit.lora.spans import Span
from lorakit.lora.streams import Stream
from lorakit.models import cross_entropy


@dataclass(frozen=True)
class Targets:
    """The tokens whose losses are taken, several a position if need be.

    Attributes:
        positions: (m,), int64, rising: which hidden state predicts each token.
        tokens: (m,), int64.
    """

    positions: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def one_each(cls, tokens: torch.Tensor) -> Targets:
        """One token (n,) for each of n positions."""
        return cls(torch.arange(len(tokens), device=tokens.device), tokens)


@dataclass(frozen=True, eq=False)
class Head:
    """`post(h Wᵀ + b)`, with updates beside it.

    `post(z)` is `scale * z`, then `softcap * tanh(z / softcap)` if there is a softcap.

    Attributes:
        spans: which of the positions have an update; `begin` and `end` count hidden states, and
            spans may overlap.
    """

    W: torch.Tensor
    b: torch.Tensor | None
    scale: float = 1.0
    softcap: float | None = None
    spans: tuple[Span, ...] = ()


def spans_on_route(
    layer: LoraLinear, inputs: torch.Tensor, keep: torch.Tensor
) -> tuple[list[Span], list[torch.Tensor]] | None:
    """The spans of the hidden states that `layer`'s adapters on the route serve, and factors.

    Args:
        inputs: (batch, seq), what the model reads.
        keep: (batch, seq - 1), which positions predict a supervised token: theirs are the hidden
            states, row after row.

    Returns: A and B of each span, one after the other; None where the layer computes more than
        spans have.
    """
    route = layer.routing.route
    parts: list[tuple[str, int, int, Stream | None]]
    if route.rows is None:
        every = int(keep.sum())
        parts = [(name, 0, every, None) for name in route.shared]
    elif route.grouped is not None:
        return None
    else:
        dim, found = route.parts(inputs)
        each = F.pad(keep, (0, 1)).split([part.size for part in found], dim)
        ends = torch.stack([own.sum() for own in each]).cumsum(0).tolist()
        begins = [0, *ends[:-1]]
        parts = [
            (part.adapter, begin, end, part.stream)
            for part, begin, end in zip(found, begins, ends, strict=True)
        ]
    own = [part for part in parts if part[0] in layer.r and part[1] < part[2]]
    h = layer.base_weight
    if layer.merged_adapters or not all(layer.is_plain(h, name) for name, *_ in own):
        return None
    spans = [
        Span(begin, end, layer.scaling[name], layer.share_dropped(name), stream)
        for name, begin, end, stream in own
    ]
    return spans, [factor for name, *_ in own for factor in layer.factors(name)]


def adapted_cross_entropy(
    h: torch.Tensor,
    head: Head,
    targets: Targets,
    factors: Sequence[torch.Tensor] = (),
    smoothing: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss (m,) of each target behind hidden states, in nats, in float32 or wider.

    Gradients reach `h` and the factors.

    Args:
        h: (n, d).
        head: with W (V, d) and b (V,) or None, both frozen.
        factors: A (r, d) and B (V, r) of each of the head's spans; ranks may differ.
        smoothing: (n,), as in `ChunkedCrossEntropy`.
    """
    return AdaptedCrossEntropy.apply(h, head, targets, smoothing, *factors)


class AdaptedCrossEntropy(torch.autograd.Function):
    """`-log softmax(post(h Wᵀ + b + s (drop(h) Aᵀ) Bᵀ))` at the targets.

    With P the softmax of a position and g_k the incoming gradient of its target t_k, the gradient
    of its logits is G = Σ g_k (P − e_{t_k}), and from there all is as in `LoraLinearFunction`.
    Positions without an incoming gradient take no part in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        head: Head,
        targets: Targets,
        smoothing: torch.Tensor | None,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        inner, masks = _inner(h, head.spans, factors)
        wide = torch.promote_types(h.dtype, torch.float32)
        losses = torch.empty(len(targets.tokens), dtype=wide, device=h.device)
        for at, end, own in _chunks(len(h), head, targets):
            logits, _ = _logits(h, head, factors, inner, at, end)
            largest = torch.softmax(logits, dim=-1, dtype=wide).amax(-1)
            log_sums = logits.amax(-1).to(wide) - largest.log_()
            local, tokens = targets.positions[own] - at, targets.tokens[own]
            wanted = logits[local, tokens].to(wide)
            if smoothing is not None:
                even = smoothing[at:end][local]
                wanted = (1 - even) * wanted + even * logits.mean(-1, dtype=wide)[local]
            losses[own] = log_sums[local] - wanted
        ctx.head, ctx.targets = head, targets
        ctx.save_for_backward(h, smoothing, *factors, *inner, *masks)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, smoothing, *saved = ctx.saved_tensors
        count = len(ctx.head.spans)
        factors, inner, masks = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        whole_h = h
        h, head, targets, grad, kept = _with_gradient(h, ctx.head, ctx.targets, grad)
        if kept is not None:
            smoothing = None if smoothing is None else smoothing[kept]
            own = [
                kept[span.begin : span.end] - before.begin
                for span, before in zip(head.spans, ctx.head.spans, strict=True)
            ]
            inner = [x[rows] for x, rows in zip(inner, own, strict=True)]
            masks = [m if m is None else m[rows] for m, rows in zip(masks, own, strict=True)]
        dh = torch.empty_like(h)
        found: list[torch.Tensor | None] = [None] * len(factors)
        needed = ctx.needs_input_grad[4:]
        for at, end, own_targets in _chunks(len(h), head, targets):
            logits, slope = _logits(h, head, factors, inner, at, end)
            G = torch.softmax(logits, dim=-1, dtype=grad.dtype)
            local, g = targets.positions[own_targets] - at, grad[own_targets]
            total = g.new_zeros(end - at).index_add_(0, local, g)
            G *= total[:, None]
            if smoothing is not None:
                even = smoothing[at:end]
                G -= (total * even / G.shape[1])[:, None]
                g = g * (1 - even[local])
            G.index_put_((local, targets.tokens[own_targets]), -g, accumulate=True)
            if slope is not None:
                G *= slope
            if head.scale != 1:
                G *= head.scale
            narrow = G.to(h.dtype)
            torch.matmul(narrow, head.W, out=dh[at:end])
            for i, span in enumerate(head.spans):
                a, b = max(at, span.begin), min(end, span.end)
                if a >= b:
                    continue
                A, B = factors[2 * i : 2 * i + 2]
                rows = slice(a - span.begin, b - span.begin)
                mask = None if masks[i] is None else masks[i][rows]
                parts = gradients(
                    dh[a:b], narrow[a - at : b - at], h[a:b], inner[i][rows], A, B, mask,
                    span.scaling, 1 - span.p, needed[2 * i : 2 * i + 2],
                )  # fmt: skip
                for k, part in enumerate(parts, 2 * i):
                    there = found[k]
                    found[k] = part if there is None or part is None else there.add_(part)
        for k, (factor, value) in enumerate(zip(factors, found, strict=True)):
            if value is None and needed[k]:
                found[k] = torch.zeros_like(factor)
        if kept is not None:
            dh = torch.zeros_like(whole_h).index_copy_(0, kept, dh)
        return dh if ctx.needs_input_grad[0] else None, None, None, None, *found


def _inner(
    h: torch.Tensor, spans: Sequence[Span], factors: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """drop(h) Aᵀ of each span, and what its dropout has kept."""
    inner: list[torch.Tensor] = []
    masks: list[torch.Tensor | None] = []
    for span, A in zip(spans, factors[::2], strict=True):
        seen, mask = h[span.begin : span.end], None
        if span.p:
            with span.stream.drawing(h.device) if span.stream else nullcontext():
                seen, mask = torch.native_dropout(seen, span.p, True)
        inner.append(seen @ A.to(h.dtype).T)
        masks.append(mask)
    return inner, masks


def _chunks(count: int, head: Head, targets: Targets) -> Iterator[tuple[int, int, slice]]:
    """Neighbouring positions from and to, and which of the targets are theirs."""
    rows = max(1, cross_entropy.CHUNK_ELEMENTS // head.W.shape[0])
    begins = [*range(0, count, rows), count]
    borders = torch.searchsorted(
        targets.positions, torch.tensor(begins, device=targets.positions.device)
    ).tolist()
    for i in range(len(begins) - 1):
        yield begins[i], begins[i + 1], slice(borders[i], borders[i + 1])


def _logits(
    h: torch.Tensor,
    head: Head,
    factors: Sequence[torch.Tensor],
    inner: Sequence[torch.Tensor],
    at: int,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits of some positions, and the slope of the softcap there."""
    z = F.linear(h[at:end], head.W, head.b)
    for span, x, B in zip(head.spans, inner, factors[1::2], strict=True):
        a, b = max(at, span.begin), min(end, span.end)
        if a < b:
            part = x[a - span.begin : b - span.begin]
            z[a - at : b - at].addmm_(part, B.to(h.dtype).T, alpha=span.scaling)
    if head.scale != 1:
        z = z * head.scale
    if head.softcap is None:
        return z, None
    capped = torch.tanh(z / head.softcap)
    wide = torch.promote_types(h.dtype, torch.float32)
    return capped * head.softcap, 1 - capped.to(wide).square()


def _with_gradient(
    h: torch.Tensor, head: Head, targets: Targets, grad: torch.Tensor
) -> tuple[torch.Tensor, Head, Targets, torch.Tensor, torch.Tensor | None]:
    """All of these for the positions that have a gradient, and which these are; None for all."""
    has = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    has[targets.positions[grad != 0]] = True
    if has.all():
        return h, head, targets, grad, None
    kept = has.nonzero().squeeze(1)
    place = has.cumsum(0) - 1
    borders = torch.tensor([x for s in head.spans for x in (s.begin, s.end)], device=h.device)
    moved = torch.searchsorted(kept, borders).tolist()
    spans = tuple(
        replace(span, begin=moved[2 * i], end=moved[2 * i + 1]) for i, span in enumerate(head.spans)
    )
    own = has[targets.positions]
    fewer = Targets(place[targets.positions[own]], targets.tokens[own])
    return h[kept], replace(head, spans=spans), fewer, grad[own], kept
