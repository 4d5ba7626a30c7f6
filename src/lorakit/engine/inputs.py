"""What the model gets in the three kinds of forward: whole prompts, a part of a row, newest tokens.

Each says to the cache whose keys and values come, and returns the model's arguments: tokens,
positions and a mask (rows, 1, queries, keys) of what each token sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorakit.engine.cache import RowCache


def whole_prompts(
    cache: RowCache, first: int, prompts: Sequence[Sequence[int]], device: torch.device
) -> dict[str, Any]:
    """Prompts of rows from `first` on, side by side, padded on the left."""
    lengths = [len(prompt) for prompt in prompts]
    cache.whole_prompts(first, lengths)
    width = max(lengths)
    # Padding is the prompt's own token: nothing that the model would not compute anyway.
    ids = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    columns = torch.arange(width, device=device)
    begins = width - torch.tensor(lengths, device=device)[:, None]
    mask = None  # attention is causal then, from the first key on
    if len(prompts) > 1:
        real = columns >= begins
        # Padding sees padding, as what sees nothing is NaN.
        alike = real[:, None] == real[:, :, None]
        mask = (alike & (columns <= columns[:, None]))[:, None]
    return _arguments(cache, ids, (columns - begins).clamp_(min=0), mask)


def part_of_row(
    cache: RowCache, row: int, tokens: Sequence[int], start: int, device: torch.device
) -> dict[str, Any]:
    """A row's tokens from its position `start` on, those before which have been read."""
    cache.part_of_row(row, start)
    end = start + len(tokens)
    positions = torch.arange(start, end, device=device)
    before = torch.arange(end, device=device)
    mask = (before <= positions[:, None])[None, None] if start else None
    return _arguments(cache, [tokens], positions[None], mask)


def newest_tokens(
    cache: RowCache, tokens: Sequence[int], lengths: Sequence[int], device: torch.device
) -> dict[str, Any]:
    """One token of each row from the first on, which have these lengths before it."""
    cache.newest_tokens(lengths, device)
    positions = torch.tensor(lengths, device=device)[:, None]
    # Also where it hides nothing: with a mask a CPU takes the quicker of two ways.
    mask = (torch.arange(max(lengths) + 1, device=device) <= positions)[:, None, None]
    return _arguments(cache, [[token] for token in tokens], positions, mask)


def _arguments(
    cache: RowCache,
    ids: Sequence[Sequence[int]],
    positions: torch.Tensor,
    mask: torch.Tensor | None,
) -> dict[str, Any]:
    return {
        "input_ids": torch.tensor(ids, device=positions.device),
        "position_ids": positions,
        "attention_mask": mask,
        "past_key_values": cache,
        "use_cache": True,
    }
