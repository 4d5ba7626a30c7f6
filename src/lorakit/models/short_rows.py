"""Attention of the short rows of a line on a CPU, many rows in a few products.

A row of some dozen tokens is less work than the calls that compute it. Rows of like length are
therefore padded to one length and computed together, as long as that adds little work; long ones
are each a product of their own, or SDPA's. Where the tokens of each row and of the prefixes before
it stand in the line is found once a batch, for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from lorakit.models.varlen import listed

TOGETHER_UP_TO = 128
"""Positions that a row sees up to which several rows are faster in one product."""

ALONE_UP_TO = {torch.bfloat16: 512, torch.float32: 0, torch.float64: 0}
"""Positions that a row sees up to which products and a softmax beat SDPA for it alone."""

SPARED = 8192
"""Pairs of a query and a key that cost about as much as the calls of a product more."""

_SHARE = 0.25  # of a group's work may be padding, where that is more


@dataclass(frozen=True)
class Group:
    """R rows that are computed together, with at most T tokens and S positions each.

    Attributes:
        queries: (R, T), where the row's own tokens stand in the line.
        keys: (R, S), where the tokens stand that it may see: those of its prefixes, then its own.
        added: (R, 1, 1, T, S) to the scores: 0 for what is seen, else -inf.
        real: (R, 1, 1, T, 1), 1 for a token and 0 for padding; None without padding.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    added: torch.Tensor
    real: torch.Tensor | None


@dataclass(frozen=True)
class Plan:
    """How the rows of a line are grouped.

    Attributes:
        places: where each token of the groups stands in their padded queries, one group behind the
            other, in the order of the line.
        long: where the tokens of each other row stand in the line, and those that it may see.
        short: where the tokens of the groups stand in the line; None where there are no others.
        order: (tokens,), where each token of the line stands behind such a line and the long rows
            one after the other.
    """

    groups: tuple[Group, ...]
    places: torch.Tensor
    long: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    short: torch.Tensor | None = None
    order: torch.Tensor | None = None


_plans: Any = WeakTensorKeyDictionary()


def plan_of(
    begins: torch.Tensor, parents: torch.Tensor | None, window: int | None, dtype: torch.dtype
) -> Plan | None:
    """The plan for a line, made once a batch; None where all rows are computed one by one.

    Args:
        begins: (rows + 1,), where each row begins, and the end.
        parents: (rows,), the row that each continues, -1 for none; None for no such rows.
        window: how many positions a token sees, itself among them.
        dtype: of the scores.
    """
    made = _plans.setdefault(begins, {})
    if (window, dtype) not in made:
        made[window, dtype] = _planned(listed(begins), parents, window, dtype)
    found: Plan | None = made[window, dtype]
    return found


def _planned(
    begins: Sequence[int], parents: torch.Tensor | None, window: int | None, dtype: torch.dtype
) -> Plan | None:
    if (alone := ALONE_UP_TO.get(dtype)) is None:
        return None
    own = [[*range(begin, end)] for begin, end in pairwise(begins)]
    seen: list[list[int]] = []
    behind = [-1] * len(own) if parents is None else listed(parents)
    for tokens, parent in zip(own, behind, strict=True):
        seen.append(tokens if parent < 0 else [*seen[parent], *tokens])
    divided = in_groups([(len(q), len(k)) for q, k in zip(own, seen, strict=True)])
    chosen = [rows for rows in divided if len(rows) > 1 or len(seen[rows[0]]) <= alone]
    if not chosen:
        return None
    places, padded = torch.full((begins[-1],), -1), 0
    groups = []
    for rows in chosen:
        group = _group([own[i] for i in rows], [seen[i] for i in rows], window, dtype)
        width = group.queries.shape[1]
        for number, i in enumerate(rows):
            first = padded + number * width
            places[begins[i] : begins[i + 1]] = torch.arange(first, first + len(own[i]))
        padded += group.queries.numel()
        groups.append(group)
    if not (others := [rows[0] for rows in divided if rows not in chosen]):
        return Plan(tuple(groups), places)
    long = tuple((torch.tensor(own[i]), torch.tensor(seen[i])) for i in others)
    order = torch.arange(begins[-1])
    order[torch.cat([tokens for tokens, _ in long])] = begins[-1] + torch.arange(
        sum(len(tokens) for tokens, _ in long)
    )
    short = (places >= 0).nonzero()[:, 0]
    return Plan(tuple(groups), places[short], long, short, order)


def in_groups(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Which rows are computed together, by their tokens and the positions that these see."""
    groups: list[list[int]] = []
    most = real = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i][::-1]):
        tokens, positions = sizes[i]
        most, real = max(most, tokens), real + tokens * positions
        padding = (len(groups[-1]) + 1) * most * positions - real if groups else 0
        alone = not groups or positions > TOGETHER_UP_TO
        if alone or padding > max(SPARED, _SHARE * real):
            groups.append([])
            most, real = tokens, tokens * positions
        groups[-1].append(i)
    return groups


def _group(
    own: Sequence[Sequence[int]],
    seen: Sequence[Sequence[int]],
    window: int | None,
    dtype: torch.dtype,
) -> Group:
    tokens = torch.tensor([len(row) for row in own])[:, None, None]
    positions = torch.tensor([len(row) for row in seen])[:, None, None]
    T, S = int(tokens.max()), int(positions.max())
    query, key = torch.arange(T)[None, :, None], torch.arange(S)[None, None]
    at = positions - tokens + query  # the position of each query
    hidden = (key > at) | (key >= positions)
    if window is not None:
        hidden |= key <= at - window
    real = query < tokens
    hidden &= real  # padding sees something, and has no share in any gradient
    return Group(
        # Padding is a token of the row itself, so that NaN stays in its row.
        torch.tensor([[*row, *[row[0]] * (T - len(row))] for row in own]),
        torch.tensor([[*row, *[row[0]] * (S - len(row))] for row in seen]),
        torch.zeros(len(own), 1, 1, T, S, dtype=dtype).masked_fill_(
            hidden[:, None, None], -torch.inf
        ),
        None if bool(real.all()) else real[:, None, None].to(dtype),
    )


class ShortRowsAttention(torch.autograd.Function):
    """`softmax(scale * q k^T, causal) v` within the rows of a line.

    Shapes: q (tokens, heads, d), k and v (tokens, kv_heads, d); returns (tokens, heads, d), zeros
    for rows that stand in no group. Only the probabilities P are kept beside the inputs: with
    G = dL/do, dv = P^T G, dP = G v^T, dS = P * (dP - rowsum(dP * P)), dq = scale * dS k,
    dk = scale * dS^T q; what several rows say of a key that they share is added up.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, plan: Plan
    ) -> torch.Tensor:
        kept, out = [], []
        for group in plan.groups:
            Q, K, V = _queries(q, k, group).mul_(scale), _keys(k, group), _keys(v, group)
            scores = (Q @ K.mT).view(*K.shape[:2], -1, *group.added.shape[-2:])
            P = scores.add_(group.added).softmax(-1)
            if group.real is not None:
                P.mul_(group.real)
            kept.append(P.flatten(2, 3))
            out.append(_in_order(kept[-1] @ V, q))
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.plan = scale, plan
        return _in_line(out, plan, len(q))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for group, P in zip(ctx.plan.groups, kept, strict=True):
            G, K, V = _queries(grad, k, group), _keys(k, group), _keys(v, group)
            Q = _queries(q, k, group).mul_(ctx.scale)
            dS = torch.ops.aten._softmax_backward_data(G @ V.mT, P, -1, P.dtype)
            dq.append(_in_order((dS @ K).mul_(ctx.scale), q))
            keys = group.keys.flatten()
            dk.index_add_(0, keys, _per_token(dS.mT @ Q))
            dv.index_add_(0, keys, _per_token(P.mT @ G))
        return _in_line(dq, ctx.plan, len(q)), dk, dv, None, None


def _queries(x: torch.Tensor, k: torch.Tensor, group: Group) -> torch.Tensor:
    """(tokens, heads, d) to (R, kv_heads, heads / kv_heads * T, d), a copy."""
    R, T = group.queries.shape
    kv_heads = k.shape[1]
    chosen = x.index_select(0, group.queries.flatten())
    chosen = chosen.view(R, T, kv_heads, -1, x.shape[-1]).permute(0, 2, 3, 1, 4)
    return chosen.reshape(R, kv_heads, -1, x.shape[-1])


def _keys(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(tokens, kv_heads, d) to (R, kv_heads, S, d)."""
    R, S = group.keys.shape
    return x.index_select(0, group.keys.flatten()).view(R, S, *x.shape[1:]).transpose(1, 2)


def _per_token(x: torch.Tensor) -> torch.Tensor:
    """(R, kv_heads, S, d) to (R * S, kv_heads, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _in_order(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(R, kv_heads, heads / kv_heads * T, d) to (R * T, heads, d)."""
    (R, kv_heads, _, d), heads = x.shape, q.shape[1]
    x = x.view(R, kv_heads, heads // kv_heads, -1, d).permute(0, 3, 1, 2, 4)
    return x.reshape(-1, heads, d)


def _in_line(parts: Sequence[torch.Tensor], plan: Plan, tokens: int) -> torch.Tensor:
    """The groups' padded tokens as a line of so many."""
    whole = parts[0] if len(parts) == 1 else torch.cat([*parts])
    found = whole.index_select(0, plan.places)
    if plan.short is None:
        return found
    return found.new_zeros(tokens, *found.shape[1:]).index_copy_(0, plan.short, found)
