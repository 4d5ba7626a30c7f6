"""The seam between a sweep and what trains its configurations.

A sweep decides what is trained how far; a runner does it. Either runner can go on from the
checkpoints of the other, which are those of `lorakit train`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorakit.training.recipe import Recipe


@dataclass(frozen=True)
class Configuration:
    """One point of a sweep.

    Attributes:
        name: of its folder; unique and short: `r8-lr3e-4`, or `c03` where that is long.
        changes: the swept dotted keys and their values.
        recipe: complete; `recipe.output_dir` is `<sweep>/<name>`.
    """

    name: str
    changes: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Progress:
    """How far a configuration has come, and what it does to the held-out rows there.

    Attributes:
        step: optimiser steps done.
        planned: optimiser steps of the whole run.
        losses: by split, for each held-out row its summed nats and its supervised tokens.
        diverged: what was no number and at which step, else None.
        train_losses: step and mean nats per supervised token, since the start.
        seconds: its share of the time that training took since the start.
    """

    step: int
    planned: int
    losses: Mapping[str, list[tuple[float, int]]]
    diverged: str | None
    train_losses: list[tuple[int, float]]
    seconds: float


class Runner(Protocol):
    """Trains configurations, each to a share of its own run."""

    def advance(self, configurations: Sequence[Configuration], to: float) -> dict[str, Progress]:
        """Trains each to the share `to` (0 < to <= 1) of its own planned steps.

        Goes on from where its own folder says it is; writes its checkpoint, and at `to == 1` its
        adapter files, there.
        """
