"""What is known of each configuration, in a file of its folder: all that resuming needs.

A record is written when a configuration has reached a rung.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, PrivateAttr

from lorakit import atomic
from lorakit.bootstrap import RowLosses, mean_loss
from lorakit.errors import InputError
from lorakit.sweeps.space.configurations import Configuration

Metrics = dict[str, list[Any]]
"""By name, the metric of each row: a number, or nested lists of them."""

RECORD_NAME = "sweep-progress.json"
_NEW: dict[str, Any] = {
    "planned": 0,
    "step": 0,
    "diverged": None,
    "seconds": 0.0,
    "rungs": [],
    "train_losses": [],
}


@dataclass(frozen=True)
class Progress:
    """How far a configuration has come, and its losses on the held-out rows there.

    Attributes:
        step, planned: optimizer steps done, and those of the whole run.
        losses: by split, for each held-out row its summed nats and its supervised tokens, by the
            objective of the sweep's recipe.
        metrics: by split, the metrics of `Loss` of each held-out row, by the same objective.
        scores: `loss` and scores of all held-out rows, by the configuration's own objective.
        diverged: what was NaN or Inf and at which step, else None.
        train_losses: step and mean nats per supervised token, since the start.
        seconds: its share of the time that training took since the start.
    """

    step: int
    planned: int
    losses: Mapping[str, RowLosses]
    diverged: str | None
    train_losses: list[tuple[int, float]]
    seconds: float
    metrics: Mapping[str, Metrics] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


class Rung(BaseModel):
    """A configuration at a share of its run: see `Progress`."""

    share: int | float
    step: int
    losses: dict[str, RowLosses]
    metrics: dict[str, Metrics] = {}

    def sums(self, split: str) -> dict[str, torch.Tensor]:
        """Of each row of a split its `Loss.sums`, by name (rows, …)."""
        totals, counts = zip(*self.losses[split], strict=True)
        columns = {"total": totals, "count": counts, **self.metrics.get(split, {})}
        return {name: torch.tensor(c, dtype=torch.float64) for name, c in columns.items()}

    @property
    def means(self) -> dict[str, float]:
        """Nats per supervised token by split."""
        return {split: mean_loss(rows) for split, rows in self.losses.items()}


class Record(BaseModel):
    """What became of one configuration so far; its fields are those of its file.

    `rungs` are those that it has reached, the last one with share 1 when it is finished.
    """

    changes: dict[str, Any]
    planned: int
    step: int
    diverged: str | None
    seconds: int | float
    rungs: list[Rung]
    train_losses: list[tuple[int, float]]
    scores: dict[str, float] = {}
    _configuration: Configuration = PrivateAttr()

    @property
    def configuration(self) -> Configuration:
        """Whose record it is."""
        return self._configuration

    @property
    def name(self) -> str:
        """The configuration's."""
        return self._configuration.name

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return _path(self._configuration)

    @property
    def finished(self) -> bool:
        """Whether its run came to its end."""
        return any(rung.share == 1 for rung in self.rungs)

    def at(self, share: float) -> Rung | None:
        """The rung at `share`, None where it was not reached."""
        return next((r for r in self.rungs if abs(r.share - share) < 1e-9), None)

    @property
    def last(self) -> Rung:
        """The last rung that was reached, by one that has not diverged."""
        return self.rungs[-1]

    def add(self, share: float, progress: Progress) -> None:
        """Adds what a runner reports, and writes the record."""
        for name in ("planned", "step", "diverged", "seconds", "train_losses"):
            setattr(self, name, getattr(progress, name))
        if progress.diverged is None:
            self.scores = dict(progress.scores)
            losses, metrics = dict(progress.losses), dict(progress.metrics)
            self.rungs.append(Rung(share=share, step=progress.step, losses=losses, metrics=metrics))
        atomic.write_file(self.path, json.dumps(self.model_dump(), ensure_ascii=False) + "\n")


def read_record(configuration: Configuration) -> Record:
    """The record of a configuration, an empty one where it has not begun."""
    path, values = _path(configuration), _NEW
    try:
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
        record = Record.model_validate({**values, "changes": dict(configuration.changes)})
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is damaged: remove it, and the configuration is evaluated again"
        ) from error
    record._configuration = configuration
    return record


def _path(configuration: Configuration) -> Path:
    return Path(configuration.recipe.output_dir) / RECORD_NAME
