"""Attention for rows that lie in one line, each confined to itself.

Padding-free batches have shape (1, tokens): the rows one after another, their position ids
restarting. transformers' models hand their attention to a function from a registry, with the rows'
boundaries among its arguments (`cu_seq_lens_q`, the name that flash attention gave them). The
function here computes short rows of like length together on a CPU (`short_rows.py`) and long ones
one by one, so that the work is that of the rows alone; the form is chosen by what was measured
(docs/performance.md). A GPU has kernels that take all rows at once (`varlen.py`). Without
boundaries it is transformers' SDPA.

A line may hold a tree (`data/prefixes.py`): segments that continue another one, whose keys and
values they see before their own. Where tokens of a row see later ones, as a picture's do in
Gemma 3, the model's own mask of the line says so, of which each row is given its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorakit.models.short_rows import Plan, ShortRowsAttention, plan_of
from lorakit.models.varlen import all_rows, listed, row_lengths

NAME = "lorakit_rows"
"""Under this name transformers' registries know the functions of this module."""

_rows_apart: ContextVar[bool] = ContextVar("rows_apart", default=False)
_plain_allowed: ContextVar[bool] = ContextVar("plain_allowed", default=True)

_KINDS = ("token_type_ids", "mm_token_type_ids")
"""Names under which models are told which tokens are of pictures."""


@contextmanager
def rows_apart(
    batch: Mapping[str, torch.Tensor] | None = None, plain: bool = True
) -> Iterator[None]:
    """Within this block no mask is built of lines: the rows' boundaries say all that it would.

    One is, where a model is told which tokens are of pictures, unless their positions are all that
    is done with that.

    Args:
        batch: what the model is given; None is a line without pictures. Without boundaries in it
            nothing changes.
        plain: False computes with SDPA alone, which rounds as it does without boundaries.
    """
    apart = batch is None or "cu_seq_lens_q" in batch
    if batch is not None and apart and any(name in batch for name in _KINDS):
        apart = batch["position_ids"].ndim == 3
    tokens = _rows_apart.set(apart), _plain_allowed.set(plain)
    try:
        yield
    finally:
        _rows_apart.reset(tokens[0])
        _plain_allowed.reset(tokens[1])


def row_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a line, in the registry's form.

    Shapes: query (1, heads, tokens, d), key and value (1, kv_heads, tokens, d), `cu_seq_lens_q`
    (rows + 1,): where each row begins, and the end. Returns (1, tokens, heads, d). A module that is
    not causal has no line, whatever a model hands on to it: it is a vision tower's.

    Args:
        attention_mask: (1, 1, tokens, tokens), True for what is seen in a line of one row; None is
            causal.
        parents: (rows,), the row that each continues, -1 for none; None for a line without
            shared prefixes.
        sliding_window: a position sees so many positions, itself among them.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        s_aux: (heads,), the scores of attention sinks (gpt-oss): a position more to attend to,
            without a value.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cu_seq_lens_q is None or not getattr(module, "is_causal", True):
        if s_aux is None and softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling=scaling, **kwargs
            )
        hidden = _hidden_by(attention_mask, query.shape[2], key.shape[2], query.device)
        if s_aux is not None:
            out = _sunk(query, key, value, hidden, scale, dropout, s_aux)
        else:
            assert softcap is not None
            out = _softcapped(query, key, value, hidden, scale, dropout, softcap)
        return out.transpose(1, 2), None
    if query.is_cuda:
        if parents is not None:
            raise NotImplementedError("prefixes are shared on a CPU only")
        if s_aux is not None:
            raise NotImplementedError("attention sinks are computed row by row on a CPU only")
        if attention_mask is not None:
            raise NotImplementedError("tokens that see later ones are computed on a CPU only")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = all_rows(q, k, v, cu_seq_lens_q, scale, sliding_window, softcap, dropout)
        return out[None], None
    lengths = row_lengths(cu_seq_lens_q)
    own_mask = attention_mask is not None or softcap is not None or s_aux is not None
    if not own_mask and not dropout and _plain_allowed.get():
        plan = plan_of(cu_seq_lens_q, parents, sliding_window, query.dtype)
        if plan is not None:
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            return _planned(q, k, v, scale, sliding_window, plan)[None], None
    # split, whose backward is one cat; slices would each fill a gradient as long as the line.
    queries, keys, values = (x[0].split(lengths, dim=1) for x in (query, key, value))
    if parents is not None:
        keys, values = (_behind_prefixes(parts, parents) for parts in (keys, values))
    rows, begin = [], 0
    for q, k, v in zip(queries, keys, values, strict=True):
        window = sliding_window if sliding_window and sliding_window < k.shape[1] else None
        own, end = None, begin + q.shape[1]
        if attention_mask is not None:
            own = _hidden_in_row(attention_mask[0, 0, begin:end, begin:end], k.shape[1], window)
        begin = end
        if s_aux is not None or softcap is not None:
            hidden = _hidden(q.shape[1], k.shape[1], window, q.device) if own is None else own
            if s_aux is not None:
                rows.append(_sunk(q, k, v, hidden, scale, dropout, s_aux))
            else:
                assert softcap is not None
                rows.append(_softcapped(q, k, v, hidden, scale, dropout, softcap))
        else:
            rows.append(_sdpa(q[None], k[None], v[None], scale, dropout, window, own)[0])
    return torch.cat([row.transpose(0, 1) for row in rows])[None], None


def _behind_prefixes(
    parts: Sequence[torch.Tensor], parents: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Each segment's keys or values (kv_heads, tokens, d) behind those of its prefixes."""
    whole: list[torch.Tensor] = []
    for part, parent in zip(parts, listed(parents), strict=True):
        whole.append(part if parent < 0 else torch.cat([whole[parent], part], dim=1))
    return whole


def _planned(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    plan: Plan,
) -> torch.Tensor:
    """Short rows together and the others by SDPA. Shapes as in `ShortRowsAttention`."""
    short = ShortRowsAttention.apply(q, k, v, scale, plan)
    if plan.order is None:
        return short
    found = [short]
    for own, seen in plan.long:
        chosen = (q.index_select(0, own), k.index_select(0, seen), v.index_select(0, seen))
        row_q, row_k, row_v = (x.transpose(0, 1)[None] for x in chosen)
        reach = window if window and window < len(seen) else None
        found.append(_sdpa(row_q, row_k, row_v, scale, 0.0, reach)[0].transpose(0, 1))
    return torch.cat(found).index_select(0, plan.order)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """PyTorch's attention of rows of one length.

    Shapes: q (rows, heads, T, d), the last T of S positions, k and v (rows, kv_heads, S, d);
    returns (rows, heads, T, d).

    Args:
        hidden: (T, S), what is not seen; None is as the window says, causally.
    """
    T, S = q.shape[2], k.shape[2]
    plain = hidden is None and window is None and T == S
    mask = None if plain else (_hidden(T, S, window, q.device) if hidden is None else hidden)
    mask = None if mask is None else mask.logical_not()
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=plain,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
    dropout: float,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores are softcapped. Shapes as in `_sunk`."""
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))
    scores = torch.tanh(q @ k.mT * (scale / softcap)) * softcap
    # Padding sees nothing, and must not become NaN.
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    P = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(P, dropout) @ v


def _sunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
    dropout: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Attention with a sink for each head, which takes its share of the probabilities.

    Shapes: q (…, heads, T, d), k and v (…, kv_heads, S, d), hidden (…, T, S), sinks (heads,).
    """
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(hidden, -torch.inf)
    sunk = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    P = torch.cat([scores, sunk], dim=-1)
    P = P.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(P[..., :-1], dropout) @ v


def _hidden_in_row(seen: torch.Tensor, S: int, window: int | None) -> torch.Tensor:
    """What a row's last T of S positions do not see (T, S), by what they see of themselves (T, T).

    What comes before them, of a prefix, they see as the window says.
    """
    T = seen.shape[0]
    hidden = _hidden(T, S, window, seen.device).clone()
    hidden[:, S - T :] = ~seen if seen.dtype == torch.bool else seen < 0
    return hidden


def _hidden_by(mask: torch.Tensor | None, T: int, S: int, device: torch.device) -> torch.Tensor:
    """What transformers' mask hides; without one attention is causal."""
    if mask is None:
        return _hidden(T, S, None, device)
    return ~mask if mask.dtype == torch.bool else mask < 0


@lru_cache(maxsize=32)
def _hidden(T: int, S: int, window: int | None, device: torch.device) -> torch.Tensor:
    """True where the last T of S positions do not see one (T, S): those after it, and those
    behind the window."""
    before = S - T
    hidden = torch.ones(T, S, dtype=torch.bool, device=device).triu(before + 1)
    return hidden if window is None else hidden | hidden.new_ones(T, S).tril(before - window)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    in_line = _rows_apart.get() and not kwargs.get("allow_is_bidirectional_skip")  # a tower's
    return None if in_line else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, row_attention)
AttentionMaskInterface.register(NAME, _mask)


def compile_around() -> None:
    """From now on compiled models leave `row_attention` as it is: its work depends on the rows."""
    AttentionInterface.register(NAME, torch.compiler.disable(row_attention))
