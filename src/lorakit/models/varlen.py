"""Attention over all rows of a line at once, by the kernels that a GPU has for it.

The best that is there: flash-attention where it is installed, PyTorch's own form of it
(`torch.nn.attention.varlen`), and flex attention for what these do not compute (float32, and
softcapping in PyTorch's form). On a CPU rows are computed one by one (`row_attention.py`).
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

_lists: Any = WeakTensorKeyDictionary()


def listed(numbers: torch.Tensor) -> list[int]:
    """A tensor's numbers; read once a batch for all layers, since it waits for the GPU."""
    found = _lists.get(numbers)
    if found is None:
        found = _lists[numbers] = numbers.tolist()
    return found


def row_lengths(begins: torch.Tensor) -> list[int]:
    """The tokens of each row."""
    return [end - begin for begin, end in pairwise(listed(begins))]


def all_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    begins: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention within each row, in one kernel.

    Shapes: q (tokens, heads, d), k and v (tokens, kv_heads, d), `begins` (rows + 1,), int32.
    Returns (tokens, heads, d).
    """
    half = q.dtype in (torch.float16, torch.bfloat16) and q.is_cuda
    # A position sees `window` positions, itself among them; -1 is no limit.
    left = -1 if window is None else window - 1
    longest = max(row_lengths(begins))
    rows = begins, begins, longest, longest
    if half and (flash := _flash()):
        options = {"dropout_p": dropout, "causal": True, "softcap": softcap or 0.0}
        return flash(q, k, v, *rows, softmax_scale=scale, window_size=(left, 0), **options)
    if dropout:
        raise NotImplementedError("attention dropout over rows in a line needs flash-attention")
    if half and softcap is None and (pytorchs := _pytorchs()):
        options = {}
        if (groups := q.shape[1] // k.shape[1]) > 1:
            if "enable_gqa" in signature(pytorchs).parameters:
                options = {"enable_gqa": True}
            else:  # before PyTorch 2.12
                k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return pytorchs(q, k, v, *rows, scale=scale, window_size=(left, 0), **options)
    return _flex(q, k, v, begins, scale, window, softcap)


def _flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    begins: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    attend: Any = _compiled_flex() if q.is_cuda else flex_attention
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    # Uncompiled it would hold all scores: what keeps a model's blocks eager does not hold for it.
    with torch.compiler.set_stance("default") if q.is_cuda else nullcontext():
        out = attend(
            *heads_first,
            score_mod=capped,
            block_mask=_block_mask(begins, q.shape[0], window),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _flash() -> Any:
    """flash-attention's function, None where it is not installed or does not load."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@lru_cache(maxsize=1)
def _pytorchs() -> Any:
    """PyTorch's function, None before it took windows and scales (2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "scale"} <= {*signature(varlen_attn).parameters} else None


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


_masks: Any = WeakTensorKeyDictionary()


def _block_mask(begins: torch.Tensor, tokens: int, window: int | None) -> BlockMask:
    """Which tokens see which, made once a batch for all layers with one window."""
    made = _masks.setdefault(begins, {})
    if window not in made:
        lengths = begins.diff().to(torch.int64)
        row = torch.arange(len(lengths), device=begins.device).repeat_interleave(lengths)
        reach = tokens if window is None else window

        def sees(_b: torch.Tensor, _h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> Any:
            return (row[i] == row[j]) & (i >= j) & (i < j + reach)

        made[window] = create_block_mask(sees, None, None, tokens, tokens, begins.device)
    return made[window]
