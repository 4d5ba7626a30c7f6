"""What newest tokens of several rows see, asked of the model's own mask at their true positions.

transformers' models build their masks by `masking_utils`, from a function of a query's and a key's
position (causal, sliding window, chunks). It counts both from an offset that all rows share. A
`RowCache` gives `Seen` in the place of that offset: each row's own positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers import AttentionMaskInterface

from lorakit.models.row_attention import NAME


@dataclass(frozen=True)
class Seen:
    """Positions of queries (rows, queries), and of keys (rows or 1, keys), negative for none."""

    queries: torch.Tensor
    keys: torch.Tensor


def _at_positions(original: Callable[..., Any], additive: bool) -> Callable[..., Any]:
    """The same mask, also where `q_offset` is a `Seen`.

    Args:
        additive: it is added to scores; else it is True where a key is seen.
    """

    @wraps(original)
    def mask(*args: Any, **kwargs: Any) -> Any:
        at = kwargs.get("q_offset")
        if not isinstance(at, Seen):
            return original(*args, **kwargs)
        q, k = at.queries[:, None, :, None], at.keys[:, None, None]
        row = torch.arange(len(q), device=q.device)[:, None, None, None]
        seen = kwargs["mask_function"](row, torch.zeros_like(row), q, k) & (k >= 0)
        seen = seen.expand(len(q), -1, q.shape[2], k.shape[3])
        if not additive:
            return seen
        dtype = kwargs.get("dtype", torch.float32)
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    return mask


for _name in ("sdpa", "eager", NAME):
    _original = AttentionMaskInterface._global_mapping[_name]
    AttentionMaskInterface.register(_name, _at_positions(_original, additive=_name == "eager"))
