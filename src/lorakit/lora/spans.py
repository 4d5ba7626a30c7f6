"""`LoraLinear`'s product with an adapter for each of several spans of positions.

Two forms of one formula. Each span's products are made for themselves, or all spans go through one
batched product, filled up to the longest, whatever their ranks are. A GPU takes longer to be told
of so many small products than to compute them, and always takes the second; a processor where
little is filled up.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from lorakit.lora.kernels import (
    Weight,
    add_update,
    gradients,
    keep_weight,
    kept_weight,
    shaped_as,
    unpacked,
)
from lorakit.lora.streams import Stream

FILLED = 1.25
"""On a processor: the positions of a batched product at most, beside those that are there."""


@dataclass(frozen=True, eq=False)
class Span:
    """Positions [begin, end) of a batch, and how their adapter is added there.

    Args:
        p: the share of the entries that the adapter does not see.
        stream: where that is drawn from; None is PyTorch's own generator.
        rows: the positions are rows of so many tokens, of which the adapter gets so many.
    """

    begin: int
    end: int
    scaling: float
    p: float = 0.0
    stream: Stream | None = None
    rows: tuple[int, int] | None = None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The adapter's positions of `x` (positions, d): (n, d), a copy where there is filling."""
        part = x[self.begin : self.end]
        if self.rows is None:
            return part
        length, width = self.rows
        return part.view(-1, length, x.shape[-1])[:, :width].reshape(-1, x.shape[-1])

    def put(self, part: torch.Tensor, x: torch.Tensor) -> None:
        """Puts what `of(x)` gave, changed in place, back into `x`."""
        if self.rows is not None:
            length, width = self.rows
            rows = x[self.begin : self.end].view(-1, length, x.shape[-1])
            rows[:, :width] = part.view(-1, width, x.shape[-1])


class LoraSpansFunction(torch.autograd.Function):
    """As `LoraLinearFunction` with an adapter for each of several spans of positions.

    `factors` are A and B of the first span, of the second, and so on; ranks may differ. Positions
    outside of all spans get the base's output. What an adapter computes, and its gradients, come
    of its own positions alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: Weight,
        b: torch.Tensor | None,
        spans: Sequence[Span],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, unpacked(W), b)
        kept: list[torch.Tensor | None] = []
        for span, A, B in zip(spans, factors[::2], factors[1::2], strict=True):
            part = span.of(y)
            drawn_from = span.stream.drawing(x.device) if span.stream and span.p else nullcontext()
            with drawn_from:
                kept += add_update(part, span.of(rows), A, B, span.scaling, span.p)
            span.put(part, y)
        ctx.save_for_backward(x, *keep_weight(ctx, W), *factors, *kept)
        ctx.spans = spans
        return shaped_as(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, W, *saved = ctx.saved_tensors
        G, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = G @ kept_weight(ctx, W) if ctx.needs_input_grad[0] else None
        factors, kept = saved[: 2 * len(ctx.spans)], saved[2 * len(ctx.spans) :]
        found: list[torch.Tensor | None] = []
        for i, span in enumerate(ctx.spans):
            (A, B), (xA, mask) = factors[2 * i : 2 * i + 2], kept[2 * i : 2 * i + 2]
            part = None if dx is None else span.of(dx)
            needed = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            seen, kept_share = span.of(rows), 1 - span.p
            found += gradients(
                part, span.of(G), seen, xA, A, B, mask, span.scaling, kept_share, needed
            )
            if dx is not None and part is not None:
                span.put(part, dx)
        return None if dx is None else dx.view(x.shape), None, None, None, *found


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the positions of spans lie that are filled up to the longest.

    Attributes:
        spans: how many there are.
        scaling: (spans, 1, 1).
        taken: (spans, longest), the position at each place; a span's last one fills it up, so that
            nothing of another adapter, whose numbers may be no numbers, comes near. None where all
            spans are of one length.
        filled: (spans, longest, 1), which places are filled up.
        place: (positions,), where each of them is.
    """

    spans: int
    scaling: torch.Tensor
    taken: torch.Tensor | None = None
    filled: torch.Tensor | None = None
    place: torch.Tensor | None = None

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """The positions of each span: (positions, d) to (spans, longest, d)."""
        return x.view(self.spans, -1, x.shape[-1]) if self.taken is None else x[self.taken]

    def zero_filled(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (spans, longest, r), with zeros where a span is filled up."""
        return x if self.filled is None else x.masked_fill_(self.filled, 0)

    def add_product(self, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds `left right`, of (spans, longest, r) and (spans, r, d), to x (positions, d)."""
        if self.place is None:
            x.view(self.spans, -1, x.shape[-1]).baddbmm_(left, right)
        else:
            x += torch.bmm(left, right).flatten(0, 1)[self.place]


@lru_cache(maxsize=16)  # of the latest batches; every layer of a model asks for the same one
def _layout(
    ends: tuple[int, ...],
    scalings: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> _Layout:
    begins = (0, *ends[:-1])
    scaling = torch.tensor(scalings, dtype=dtype)[:, None, None].to(device)
    sizes = torch.tensor([end - begin for begin, end in zip(begins, ends, strict=True)])
    if (sizes == sizes[0]).all():
        return _Layout(len(ends), scaling)
    steps = torch.arange(int(sizes.max()))
    inside = steps < sizes[:, None]
    taken = torch.tensor(begins)[:, None] + torch.minimum(steps, sizes[:, None] - 1)
    place = inside.flatten().nonzero().squeeze(-1)
    filled = ~inside.unsqueeze(-1)
    return _Layout(len(ends), scaling, *(x.to(device) for x in (taken, filled, place)))


class LoraBatchedSpansFunction(torch.autograd.Function):
    """As `LoraSpansFunction`, for spans that have every position and drop nothing out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: Weight,
        b: torch.Tensor | None,
        spans: Sequence[Span],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, unpacked(W), b)
        layout = _layout(
            tuple(span.end for span in spans),
            tuple(span.scaling for span in spans),
            x.device,
            factors[1].dtype,
        )
        # (spans, the largest rank, d_in) and (…, d_out); smaller ranks have rows of zeros.
        A = _stacked(factors[::2]).to(x.dtype)
        B = _stacked([B.T for B in factors[1::2]]).mul_(layout.scaling).to(x.dtype)
        xA = layout.zero_filled(torch.bmm(layout.split(rows), A.mT))
        layout.add_product(y, xA, B)
        ctx.save_for_backward(x, *keep_weight(ctx, W), A, B, xA)
        ctx.layout = layout
        ctx.like = [(factor.shape, factor.dtype) for factor in factors]
        return shaped_as(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, W, A, B, xA = ctx.saved_tensors
        layout, needed = ctx.layout, ctx.needs_input_grad
        G, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        G_each = layout.split(G)
        GB = layout.zero_filled(torch.bmm(G_each, B.mT))
        dx = None
        if needed[0]:
            dx = G @ kept_weight(ctx, W)
            layout.add_product(dx, GB, A)
            dx = dx.view(x.shape)
        dA = torch.bmm(GB.mT, layout.split(rows)).to(ctx.like[0][1])
        dB = torch.bmm(G_each.mT, xA).to(ctx.like[1][1]).mul_(layout.scaling)
        found: list[torch.Tensor | None] = []
        for i in range(len(A)):
            r = ctx.like[2 * i][0][0]
            found += [dA[i, :r] if needed[4 + 2 * i] else None]
            found += [dB[i, :, :r] if needed[5 + 2 * i] else None]
        return dx, None, None, None, *found


def _stacked(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(r, d) of each in one tensor (factors, the largest r, d)."""
    if len({len(factor) for factor in factors}) == 1:
        return torch.stack([*factors])
    return pad_sequence([*factors], batch_first=True)


def can_be_batched(spans: Sequence[Span], positions: int) -> bool:
    """Whether every position is in one span, one behind the other, and nothing is dropped out."""
    begins = [0, *(span.end for span in spans)]
    return (
        len(spans) > 1
        and begins[-1] == positions
        and all(
            span.begin == begin and span.end > begin and span.rows is None and not span.p
            for begin, span in zip(begins, spans, strict=False)
        )
    )


def like_long(spans: Sequence[Span], positions: int) -> bool:
    """Whether filling the spans up to the longest adds few positions."""
    return len(spans) * max(span.end - span.begin for span in spans) <= FILLED * positions


def lora_spans(
    x: torch.Tensor,
    W: Weight,
    b: torch.Tensor | None,
    spans: Sequence[Span],
    factors: Sequence[torch.Tensor],
) -> torch.Tensor:
    """`x W^T + b` for a frozen `W` and `b`, with the adapter of each span added to its positions.

    Args:
        spans: of the positions of x, all dimensions but the last in one line.
        factors: A (r, d_in) and B (d_out, r) of each span, one after the other.

    Shapes as in `LoraLinearFunction`. Returns (..., d_out) in x's dtype.
    """
    positions = x.shape[:-1].numel()
    batched = can_be_batched(spans, positions) and (x.is_cuda or like_long(spans, positions))
    function = LoraBatchedSpansFunction if batched else LoraSpansFunction
    return function.apply(x, W, b, spans, *factors)
