"""What a sweep asks of whoever trains its configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorakit.training.recipe import Recipe


@dataclass(frozen=True)
class Configuration:
    """One setting of a sweep.

    Attributes:
        name: a folder's name, unique and short: `r8-lr3e-4`, or `c03` where that is long.
        changes: the swept dotted keys and their values.
        recipe: complete; its `output_dir` is `<sweep>/<name>`.
    """

    name: str
    changes: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Progress:
    """How far a configuration has come.

    Attributes:
        step: optimiser steps done.
        planned: optimiser steps of the whole run.
        losses: by split's name, for each held-out row: summed nats, supervised tokens.
        diverged: what was no number and at which step, else None.
        train_losses: (step, mean nats per supervised token) since the start.
        seconds: its share of the wall time.
    """

    step: int
    planned: int
    losses: Mapping[str, list[tuple[float, int]]]
    diverged: str | None
    train_losses: list[tuple[int, float]]
    seconds: float


class Runner(Protocol):
    """Trains configurations, one by one or together."""

    def advance(self, configurations: Sequence[Configuration], to: float) -> dict[str, Progress]:
        """Trains each to the share `to` (0 < to <= 1) of its own planned steps.

        It goes on from where its own folder says it is, and writes its checkpoint (and at to == 1
        its adapter's files) there.
        """
