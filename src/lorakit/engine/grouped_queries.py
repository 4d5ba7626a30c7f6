"""Attention of several tokens a row to a longer past, where heads share keys (GQA).

transformers copies keys and values for every head that shares them, which for the rest of a prompt
behind a long beginning is most of the work. Here the queries of such heads are rows of one product
instead, as transformers has it for a single token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lorakit.models.row_attention import NAME

_OTHERS = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cache", "sliding_window")


def _grouped(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same attention, without copies of keys and values where that is possible."""

    @wraps(original)
    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
        plain = (
            not torch.is_grad_enabled()
            and groups > 1
            and 1 < tokens < key.shape[2]
            and attention_mask is not None
            and attention_mask.dtype == torch.bool
            and attention_mask.shape[1] == 1
            and query.device.type == "cpu"
            and not args
            and all(kwargs.get(name) is None for name in _OTHERS)
        )
        if not plain:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        assert attention_mask is not None
        q = query.unflatten(1, (-1, groups)).flatten(2, 3)  # (rows, kv_heads, groups * tokens, d)
        mask = attention_mask.repeat(1, 1, groups, 1)
        scale = kwargs.get("scaling")
        out = scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scale)
        out = out.unflatten(2, (groups, tokens)).flatten(1, 2)
        return out.transpose(1, 2).contiguous(), None

    return attention


for _name in ("sdpa", NAME):
    AttentionInterface.register(_name, _grouped(AttentionInterface._global_mapping[_name]))
