"""How many answers are written at once: more rows cost little until the memory is full."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import psutil
import torch

from lorakit.engine.cache import bytes_of_row
from lorakit.lora.routing import Route, Routing

if TYPE_CHECKING:
    from lorakit.engine.carried import Carried

MAX_ROWS = 64
"""Answers that are written at once, at most: two cores are no faster with more."""
FEW_ROWS = 16
"""The same where `generate` writes them, and of conversations."""


class RowMemory:
    """What rows of a model take.

    Args:
        model: the causal language model.
        routing: of its adapters.
        carried: how its rows are computed.
    """

    def __init__(self, model: Any, routing: Routing, carried: Carried) -> None:
        self._model, self._routing, self._carried = model, routing, carried

    @cached_property
    def _bytes(self) -> tuple[int, int]:
        with self._routing.using(Route()):
            return bytes_of_row(self._model)

    def rows(self, longest: int, wanted: int = MAX_ROWS) -> int:
        """How many rows of so many tokens are written at once, at least one.

        Not more than `wanted`, nor than half of the free memory holds.
        """
        most, device = min(MAX_ROWS, wanted), self._model.device
        if self._carried.why_not:
            return max(1, min(most, FEW_ROWS))
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = psutil.virtual_memory().available
        size, more = self._bytes
        return max(1, min(most, free // 2 // max(1, size + more * longest)))
