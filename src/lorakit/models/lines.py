"""Rows in one line: the tensors, and whether a model can take them. Not believed but tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from lorakit.errors import listed
from lorakit.lora.architecture import mixes_tokens, only_selects
from lorakit.models.loaded import base_model, has_dropout, in_evaluation
from lorakit.models.row_attention import NAME, rows_apart


class Lines:
    """What a model takes, tried when it is first asked for.

    Args:
        model: with its adapters, if their dropout is to count.

    Attributes:
        draws: the model has dropout of its own, which rows that share a prefix would share.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.draws = has_dropout(model)

    @cached_property
    def refused(self) -> str | None:
        """Why it takes no lines; None where it does."""
        return take_lines(self._model)

    @cached_property
    def prefixes(self) -> bool:
        """Whether it takes prefixes that rows share."""
        return self.refused is None and take_prefixes(self._model)


def take_lines(model: nn.Module) -> str | None:
    """Makes `model` ready for rows in one line; returns None, or the reason why it cannot be.

    Not believed but tried: a short row must give the logits that it gives alone behind each of two
    others, through the attention that the model had before, which it keeps where it does not.
    """
    base = base_model(model)
    name = type(base).__name__
    config = base.config.get_text_config()
    if known := _known_reason(base):
        return f"{name} {known}"
    before = base.config._attn_implementation
    try:
        with in_evaluation(model):
            keeps_apart = _keeps_rows_apart(base, config.vocab_size)
        reason = None if keeps_apart else f"{name} mixes rows that lie in one line"
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{name} does not take rows in one line ({str(error).partition(chr(10))[0]})"
    if reason:
        base.set_attn_implementation(before)
    return reason


def _known_reason(base: Any) -> str | None:
    """Why a model cannot take rows in one line, where its modules tell it."""
    if getattr(base.config.get_text_config(), "attention_chunk_size", None):
        return "attends in chunks"
    if any(only_selects(module) for module in base.modules()):
        return "chooses the tokens that it sees, of the whole line"
    if base._supports_attention_backend and base._supports_flash_attn:
        return None  # it is tried
    mixers = dict.fromkeys(type(m).__name__ for m in base.modules() if mixes_tokens(m))
    if mixers:
        return f"has {listed(mixers)}, whose state runs on into the next row"
    return "has an attention of its own"


def take_prefixes(model: nn.Module) -> bool:
    """Whether a model that takes lines takes rows behind a prefix that they share.

    Tried as well: each of two rows must give the logits that it gives alone.
    """
    base = base_model(model)
    if torch.accelerator.is_available():  # kernels that take all rows at once know no prefixes
        return False
    tokens = _tokens(base.config.get_text_config().vocab_size)
    prefix, ends = tokens[:6], (tokens[6:11], tokens[11:])
    try:
        with torch.no_grad(), in_evaluation(model):
            tree = _logits(base, in_a_line([prefix, *ends], [None, 0, 0]))
            for end, found in zip(ends, tree.split([6, 5, 6], dim=1)[1:], strict=True):
                alone = _logits(base, in_a_line([[*prefix, *end]]))
                if not _same(found, alone[:, 6:]):
                    return False
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


@torch.no_grad()
def _keeps_rows_apart(base: Any, vocab_size: int) -> bool:
    """Sets the attention of this module, and compares a row in lines with the row alone."""
    device = next(base.parameters()).device
    tokens = _tokens(vocab_size)
    row, others = tokens[:7], (tokens[7:12], tokens[12:])
    alone = _of_tokens(base, input_ids=torch.tensor([row], device=device))
    base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:
        raise ValueError("its attention cannot be set")
    first, second = (_logits(base, in_a_line([other, row]))[:, len(other) :] for other in others)
    return _same(first, alone) and _same(first, second, times=1)


def _tokens(vocab_size: int) -> list[int]:
    """From the middle of the vocabulary: models answer tokens that they never saw by chance."""
    return [(vocab_size // 2 + i) % vocab_size for i in range(17)]


def _logits(base: Any, line: Mapping[str, torch.Tensor]) -> torch.Tensor:
    device = next(base.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in line.items()}
    # The kernel that a row alone has: in bfloat16 another one rounds otherwise.
    with rows_apart(plain=False):
        return _of_tokens(base, **inputs)


def _of_tokens(base: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """The logits of each token; hidden states where a head reads the last token alone."""
    if hasattr(base, "score"):
        return base.base_model(**inputs, use_cache=False).last_hidden_state
    return base(**inputs, use_cache=False).logits


def _same(found: torch.Tensor, wanted: torch.Tensor, times: int = 16) -> bool:
    """Equal up to so many times the rounding of their dtype."""
    # Eager attention rounds its softmax to float32 whatever the dtype.
    eps = max(torch.finfo(wanted.dtype).eps, torch.finfo(torch.float32).eps)
    rounding = eps * float(wanted.abs().max())
    return float((found - wanted).abs().max()) <= times * rounding


def in_a_line(
    rows: Sequence[Sequence[int]], parents: Sequence[int | None] | None = None
) -> dict[str, torch.Tensor]:
    """The tokens of `rows` one after another, in the names of flash attention.

    Args:
        parents: the earlier row that each of `rows` continues, None for none.

    Returns: `input_ids` and `position_ids`, int64 (1, tokens); `cu_seq_lens_q` and
    `cu_seq_lens_k`, int32 (rows + 1,): where each row begins and the last one ends; with parents
    `parents`, int32 (rows,), -1 for none.
    """
    ends: list[int] = []  # as positions behind all prefixes
    positions: list[int] = []
    for row, parent in zip(rows, parents or [None] * len(rows), strict=True):
        begin = 0 if parent is None else ends[parent]
        ends.append(begin + len(row))
        positions += range(begin, ends[-1])
    begins = torch.tensor([*accumulate(map(len, rows), initial=0)], dtype=torch.int32)
    line = {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([positions]),
        "cu_seq_lens_q": begins,
        "cu_seq_lens_k": begins,
    }
    if parents is not None:
        numbers = [-1 if parent is None else parent for parent in parents]
        line["parents"] = torch.tensor(numbers, dtype=torch.int32)
    return line
