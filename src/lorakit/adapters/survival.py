"""How much of an update is left when a merged weight has been rounded.

bfloat16 has 8 significant bits. Where ΔW is 1% of W, the steps of the merged weight are so wide
that about 17% of ΔW is lost (the error's norm by that of ΔW), and 83% survives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


class Survival:
    """The sums of squares of every module's ΔW, and of the error that rounding made."""

    def __init__(self) -> None:
        self._squares: dict[str, tuple[float, float]] = {}

    def add(self, module: str, delta: float, error: float) -> bool:
        """Counts part of a weight: the sums of squares of what was added, and of the error.

        Returns: whether both are finite.
        """
        sums = self._squares.get(module, (0.0, 0.0))
        self._squares[module] = sums[0] + delta, sums[1] + error
        return math.isfinite(error) and math.isfinite(delta)

    @property
    def total(self) -> float:
        """The share of all updates together that survived: 1 where there are none."""
        squares = self._squares.values()
        return _share(math.fsum(d for d, _ in squares), math.fsum(e for _, e in squares))

    @property
    def by_module(self) -> Mapping[str, float]:
        """The share of every module's update that survived, by path."""
        return {module: _share(*squares) for module, squares in self._squares.items()}


def sum_of_squares(values: torch.Tensor) -> float:
    """‖values‖²."""
    flat = values.flatten()
    return torch.dot(flat, flat).item()


def _share(delta: float, error: float) -> float:
    return max(0.0, 1 - math.sqrt(error / delta)) if delta else 1.0
