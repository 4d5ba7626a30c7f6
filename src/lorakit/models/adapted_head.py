"""Cross-entropy behind an output layer with adapters, without ever holding all logits.

Beside the frozen `h Wᵀ + b` each span of positions has low-rank updates of its own, so that rows of
several adapters, of any ranks, take one product with the vocabulary's matrix. A position may have
several targets. Logits are kept for the backward pass where they are few, else those that have a
gradient are computed again, a chunk at a time (`cross_entropy.py` is the form for a frozen head).
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

KEPT_BYTES = 2**28
"""The most memory that the logits of a pass may take until its gradients are computed."""


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
        size = len(h) * head.W.shape[0] * h.element_size()
        keeps = any(ctx.needs_input_grad) and head.softcap is None and size <= KEPT_BYTES
        kept = h.new_empty(len(h), head.W.shape[0]) if keeps else None
        for at, end, own in _chunks(len(h), head, targets):
            logits, _ = _logits(h, head, factors, inner, at, end)
            if kept is not None:
                kept[at:end] = logits
            largest = torch.softmax(logits, dim=-1, dtype=wide).amax(-1)
            log_sums = logits.amax(-1).to(wide) - largest.log_()
            local, tokens = targets.positions[own] - at, targets.tokens[own]
            wanted = logits[local, tokens].to(wide)
            if smoothing is not None:
                even = smoothing[at:end][local]
                wanted = (1 - even) * wanted + even * logits.mean(-1, dtype=wide)[local]
            losses[own] = log_sums[local] - wanted
        ctx.head, ctx.targets, ctx.kept = head, targets, kept
        ctx.save_for_backward(h, smoothing, *factors, *inner, *masks)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole_h, smoothing, *saved = ctx.saved_tensors
        count = len(ctx.head.spans)
        factors, inner, masks = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        h, head, targets, grad, rows = _with_gradient(whole_h, ctx.head, ctx.targets, grad)
        logits, ctx.kept = ctx.kept, None  # its memory becomes that of the gradients
        if rows is not None:
            smoothing = None if smoothing is None else smoothing[rows]
            own = [
                rows[span.begin : span.end] - before.begin
                for span, before in zip(head.spans, ctx.head.spans, strict=True)
            ]
            inner = [x[i] for x, i in zip(inner, own, strict=True)]
            masks = [m if m is None else m[i] for m, i in zip(masks, own, strict=True)]
            logits = None if logits is None else logits[rows]
        dh = torch.empty_like(h)
        found = _Sums(head, h, factors, inner, masks, ctx.needs_input_grad[4:])
        for at, end, own_targets in _chunks(len(h), head, targets):
            slope = None
            if logits is None:
                z, slope = _logits(h, head, factors, inner, at, end)
            else:
                z = logits[at:end]
            even = None if smoothing is None else smoothing[at:end]
            G = _gradient(z, targets, own_targets, at, grad[own_targets], even)
            if slope is not None:
                G *= slope
            if head.scale != 1:
                G *= head.scale
            if logits is not None:
                logits[at:end] = G
            else:
                narrow = G.to(h.dtype)
                torch.matmul(narrow, head.W, out=dh[at:end])
                found.add(narrow, dh, at, end)
        if logits is not None:
            torch.matmul(logits, head.W, out=dh)
            found.add(logits, dh, 0, len(h))
        if rows is not None:
            dh = torch.zeros_like(whole_h).index_copy_(0, rows, dh)
        return dh if ctx.needs_input_grad[0] else None, None, None, None, *found.gradients()


def _gradient(
    logits: torch.Tensor,
    targets: Targets,
    own: slice,
    at: int,
    grad: torch.Tensor,
    smoothing: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of logits (n, V) behind `at`, of the losses of their `own` targets."""
    G = torch.softmax(logits, dim=-1, dtype=grad.dtype)
    local = targets.positions[own] - at
    total = grad.new_zeros(len(G)).index_add_(0, local, grad)
    G *= total[:, None]
    if smoothing is not None:
        G -= (total * smoothing / G.shape[1])[:, None]
        grad = grad * (1 - smoothing[local])
    return G.index_put_((local, targets.tokens[own]), -grad, accumulate=True)


class _Sums:
    """The gradients of the factors, summed over chunks; what the updates add to `dh` is added."""

    def __init__(
        self,
        head: Head,
        h: torch.Tensor,
        factors: Sequence[torch.Tensor],
        inner: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor | None],
        needed: Sequence[bool],
    ) -> None:
        self._head, self._h, self._factors, self._needed = head, h, factors, needed
        self._inner, self._masks = inner, masks
        self._found: list[torch.Tensor | None] = [None] * len(factors)

    def add(self, G: torch.Tensor, dh: torch.Tensor, at: int, end: int) -> None:
        """Adds what the gradient G (end - at, V) of the logits gives."""
        for i, span in enumerate(self._head.spans):
            a, b = max(at, span.begin), min(end, span.end)
            if a >= b:
                continue
            rows, mask = slice(a - span.begin, b - span.begin), self._masks[i]
            A, B = self._factors[2 * i : 2 * i + 2]
            parts = gradients(
                dh[a:b],
                G[a - at : b - at],
                self._h[a:b],
                self._inner[i][rows],
                A,
                B,
                None if mask is None else mask[rows],
                span.scaling,
                1 - span.p,
                self._needed[2 * i : 2 * i + 2],
            )
            for k, part in enumerate(parts, 2 * i):
                there = self._found[k]
                self._found[k] = part if there is None or part is None else there.add_(part)

    def gradients(self) -> list[torch.Tensor | None]:
        """Of each factor; None where none is needed."""
        found = zip(self._found, self._factors, self._needed, strict=True)
        return [
            torch.zeros_like(factor) if value is None and needed else value
            for value, factor, needed in found
        ]


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
