"""Whether rows may be padded on the left to be computed together. Not believed but tried.

Attention hides padding. Other mixers of tokens may not: lightning attention (MiniMax) and layers
that compress windows of tokens (DeepSeek V4) answer otherwise behind it.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import GenerationConfig

from lorakit.lora.architecture import mixes_tokens, only_selects
from lorakit.models.loaded import base_model, in_evaluation

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}

_LONGEST = 14  # tokens of the rows of a trial

_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def takes_left_padding(model: nn.Module) -> bool:
    """Whether a causal model answers a row behind padding as it answers the row alone.

    Models of nothing but attention do; others are tried when this is first asked of them.
    """
    base = base_model(model)
    if base not in _known:
        layers = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
        special = any(mixes_tokens(module) or only_selects(module) for module in base.modules())
        _known[base] = (layers <= _ATTENTION and not special) or _answers_alike(base)
    return _known[base]


def _answers_alike(base: Any) -> bool:
    """Whether rows that are padded together have the logits that each has alone."""
    vocabulary = base.config.get_text_config().vocab_size
    tokens = [(vocabulary // 2 + 5 * i) % vocabulary for i in range(_LONGEST)]
    rows = [tokens[:n] for n in (2, 5, 9, _LONGEST)]
    try:
        with in_evaluation(base):
            together = _logits(base, rows)
            alone = torch.cat([_logits(base, [row]) for row in rows])
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    # Rounding is far below a thousandth in float32, and what padding changes far above.
    close = max(1e-3, 16 * torch.finfo(alone.dtype).eps)
    return float((together - alone).abs().max()) <= close * float(alone.abs().max())


def _logits(base: Any, rows: list[list[int]]) -> torch.Tensor:
    """Of the tokens that follow each row, written by `generate`: (rows, 3, vocabulary)."""
    ids = torch.tensor([[0] * (_LONGEST - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (_LONGEST - len(row)) + [1] * len(row) for row in rows])
    if len(rows) == 1:
        ids, mask = ids[:, -len(rows[0]) :], mask[:, -len(rows[0]) :]
    settings = GenerationConfig(
        max_new_tokens=3, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    own, base.generation_config = base.generation_config, settings  # no end, no other rules
    try:
        with torch.inference_mode():
            written = base.generate(
                input_ids=ids.to(base.device),
                attention_mask=mask.to(base.device),
                generation_config=settings,
            )
    finally:
        base.generation_config = own
    return torch.stack(written.logits, dim=1)
