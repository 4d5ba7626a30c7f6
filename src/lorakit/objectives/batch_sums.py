"""What a batch gives to be added up: its loss as a sum, and metrics, over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loss:
    """The loss of a batch as a sum, so that batches, accumulated steps and processes add up.

    Args:
        total: the summed loss, with its graph in training.
        count: what `total` is divided by: the batch's supervised tokens, pairs, completions.
        metrics: sums beside the loss, of any shape and without a graph; by the same names in
            every batch. Those of training are logged, those of held-out rows become scores.
    """

    total: torch.Tensor
    count: torch.Tensor | int
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def sums(self) -> dict[str, torch.Tensor]:
        """All of it by name, float64 on the CPU, to be added up over batches."""
        return as_tensors({**self.metrics, "total": self.total, "count": self.count})


EACH = "each."
"""Begins the names of values of single rows (n, …), which are put together and not added up."""


MAX = "max."
"""Begins the names of numbers of which the largest is kept."""


def added(
    sums: Mapping[str, torch.Tensor], more: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`Loss.sums` of a batch and those before it together; `sums` is empty before the first."""
    import torch

    def both(name: str, value: torch.Tensor) -> torch.Tensor:
        if name.startswith(EACH):
            return torch.cat([sums[name], value])
        return torch.maximum(sums[name], value) if name.startswith(MAX) else sums[name] + value

    return {name: both(name, value) if sums else value for name, value in more.items()}


def as_tensors(sums: Mapping[str, torch.Tensor | int]) -> dict[str, torch.Tensor]:
    """Sums of a batch, float64 on the CPU, to be added up over batches."""
    import torch

    return {k: torch.as_tensor(value).detach().cpu().double() for k, value in sums.items()}


def with_sums(
    batch: Mapping[str, torch.Tensor], sums: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A batch with the sums of all (`Objective.beforehand`)."""
    return {**batch, **{f"step.{name}": value for name, value in sums.items()}}
