"""Attention for rows that lie in one line, each confined to itself.

Padding-free batches have shape (1, tokens): the rows one after another, their position ids
restarting. transformers' models hand their attention to a function from a registry, with the rows'
boundaries among its arguments (`cu_seq_lens_q`, the name that flash attention gave them). The
function here computes one row at a time on a CPU, so that the work is that of the rows alone; the
form is chosen by what was measured (docs/performance.md). A GPU has kernels that take all rows at
once (`varlen.py`). Without boundaries it is transformers' SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorakit.models.inside import base_model
from lorakit.models.varlen import all_rows, row_lengths

NAME = "lorakit_rows"
"""Under this name transformers' registries know the functions of this module."""

PLAIN_UP_TO = 512
"""Tokens of a row up to which products and a softmax beat SDPA on a CPU in bfloat16."""

_rows_apart: ContextVar[bool] = ContextVar("rows_apart", default=False)
_plain_allowed: ContextVar[bool] = ContextVar("plain_allowed", default=True)


@contextmanager
def rows_apart(plain: bool = True) -> Iterator[None]:
    """Within this block no mask is built: the rows' boundaries say all that it would.

    Args:
        plain: False computes with SDPA alone, which rounds as it does without boundaries.
    """
    tokens = _rows_apart.set(True), _plain_allowed.set(plain)
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a line, in the registry's form.

    Shapes: query (1, heads, tokens, d), key and value (1, kv_heads, tokens, d), `cu_seq_lens_q`
    (rows + 1,): where each row begins, and the end. Returns (1, tokens, heads, d).

    Args:
        sliding_window: a position sees so many positions, itself among them.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks are not computed row by row")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = all_rows(q, k, v, cu_seq_lens_q, scale, sliding_window, softcap, dropout)
        return out[None], None
    lengths = row_lengths(cu_seq_lens_q)
    rows = []
    # split, whose backward is one cat; slices would each fill a gradient as long as the line.
    for q, k, v in zip(*(x[0].split(lengths, dim=1) for x in (query, key, value)), strict=True):
        window = sliding_window if sliding_window and sliding_window < q.shape[1] else None
        rows.append(_one_row(q, k, v, scale, dropout, window, softcap))
    return torch.cat(rows, dim=1).transpose(0, 1)[None], None


def _one_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """q (heads, T, d), k and v (kv_heads, T, d) to (heads, T, d)."""
    T = q.shape[1]
    if softcap is not None:
        return _softcapped(q, k, v, scale, dropout, window, softcap)
    if (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and T <= PLAIN_UP_TO
        and not dropout
        and _plain_allowed.get()
    ):
        return RowAttention.apply(q, k, v, scale, window)
    mask = None if window is None else _hidden(T, window, q.device).logical_not()
    return F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )[0]


class RowAttention(torch.autograd.Function):
    """`softmax(scale * q k^T, causal) v` of one row, heads that share keys in one product.

    Shapes: q (heads, T, d), k and v (kv_heads, T, d); returns (heads, T, d). Only the
    probabilities P are kept beside the inputs: with G = dL/do, dv = P^T G, dP = G v^T,
    dS = P * (dP - rowsum(dP * P)), dq = scale * dS k, dk = scale * dS^T q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        heads, T, d = q.shape
        q = (q * scale).reshape(k.shape[0], -1, d)  # (kv_heads, group * T, d)
        scores = (q @ k.mT).view(k.shape[0], -1, T, T)
        P = scores.add_(_additive(T, window, q.dtype)).softmax(-1)
        P = P.view(k.shape[0], -1, T)
        ctx.save_for_backward(q, k, v, P)
        ctx.scale = scale
        return (P @ v).view(heads, T, v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, P = ctx.saved_tensors
        heads, T = grad.shape[:2]
        G = grad.reshape(k.shape[0], -1, v.shape[-1])
        dv = P.mT @ G
        dS = torch.ops.aten._softmax_backward_data(G @ v.mT, P, -1, P.dtype)
        dq = (dS @ k).mul_(ctx.scale).view(heads, T, q.shape[-1])
        return dq, dS.mT @ q, dv, None, None


def _softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float,
) -> torch.Tensor:
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    scores = torch.tanh(q @ k.mT * (scale / softcap)) * softcap
    scores = scores.masked_fill(_hidden(q.shape[1], window, q.device), -torch.inf)
    P = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(P, dropout) @ v


@lru_cache(maxsize=32)
def _hidden(T: int, window: int | None, device: torch.device) -> torch.Tensor:
    """True where a position (T, T) is not seen: those after it, and those behind the window."""
    hidden = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
    return hidden if window is None else hidden | hidden.new_ones(T, T).tril(-window)


@lru_cache(maxsize=32)
def _additive(T: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    hidden = _hidden(T, window, torch.device("cpu"))
    return torch.zeros(T, T, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return None if _rows_apart.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, row_attention)
AttentionMaskInterface.register(NAME, _mask)


def take_lines(model: nn.Module) -> str | None:
    """Makes `model` ready for rows in one line; returns None, or the reason why it cannot be.

    Not believed but tried: a short row must give the logits that it gives alone behind each of two
    others, through the attention that the model had before, which it keeps where it does not.
    """
    base = base_model(model)
    name = type(base).__name__
    config = base.config.get_text_config()
    if not (base._supports_attention_backend and base._supports_flash_attn):
        return f"{name} has an attention of its own"
    if getattr(config, "attention_chunk_size", None):
        return f"{name} attends in chunks"
    before = base.config._attn_implementation
    was_training = model.training
    model.eval()
    try:
        keeps_apart = _keeps_rows_apart(base, config.vocab_size)
        reason = None if keeps_apart else f"{name} mixes rows that lie in one line"
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{name} does not take rows in one line ({str(error).partition(chr(10))[0]})"
    finally:
        model.train(was_training)
    if reason:
        base.set_attn_implementation(before)
    return reason


@torch.no_grad()
def _keeps_rows_apart(base: Any, vocab_size: int) -> bool:
    """Sets the attention of this module, and compares a row in lines with the row alone."""
    device = next(base.parameters()).device
    # From the middle of the vocabulary: models answer tokens that they never saw by chance.
    tokens = [(vocab_size // 2 + i) % vocab_size for i in range(17)]
    row, others = tokens[:7], (tokens[7:12], tokens[12:])
    alone = base(input_ids=torch.tensor([row], device=device), use_cache=False).logits
    base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:
        raise ValueError("its attention cannot be set")

    def behind(other: list[int]) -> torch.Tensor:
        inputs = {name: tensor.to(device) for name, tensor in in_a_line([other, row]).items()}
        # The kernel that the row alone had: in bfloat16 another one rounds otherwise.
        with rows_apart(plain=False):
            return base(**inputs, use_cache=False).logits[:, len(other) :]

    first, second = map(behind, others)
    # Eager attention rounds its softmax to float32 whatever the dtype.
    eps = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps)
    rounding = eps * float(alone.abs().max())
    return (
        float((first - alone).abs().max()) <= 16 * rounding
        and float((first - second).abs().max()) <= rounding
    )


def in_a_line(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """The tokens of `rows` one after another, in the names of flash attention.

    Returns: `input_ids` and `position_ids`, int64 (1, tokens); `cu_seq_lens_q` and
    `cu_seq_lens_k`, int32 (rows + 1,): where each row begins and the last one ends.
    """
    begins = torch.tensor([*accumulate(map(len, rows), initial=0)], dtype=torch.int32)
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row))]]),
        "cu_seq_lens_q": begins,
        "cu_seq_lens_k": begins,
    }


def compile_around() -> None:
    """From now on compiled models leave `row_attention` as it is: its work depends on the rows."""
    AttentionInterface.register(NAME, torch.compiler.disable(row_attention))
