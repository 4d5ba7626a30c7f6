"""What is known of each configuration, in a file of its folder: all that resuming needs.

A record is written when a configuration has reached a rung. Every decision follows from records
alone, so that a sweep that is resumed after a kill decides as an undisturbed one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit import atomic
from lorakit.errors import InputError
from lorakit.evaluation.loss import RowLosses
from lorakit.sweeps.bootstrap import mean_loss
from lorakit.sweeps.space.configurations import Configuration

RECORD_NAME = "sweep-progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a configuration has come, and what it does to the held-out rows there.

    Attributes:
        step: optimizer steps done.
        planned: optimizer steps of the whole run.
        losses: by split, for each held-out row its summed nats and its supervised tokens.
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


@dataclass(frozen=True)
class Rung:
    """A configuration at a share of its run: see `Progress`."""

    share: float
    step: int
    losses: dict[str, RowLosses]


class Record:
    """What became of one configuration so far.

    Attributes:
        rungs: those that it has reached, the last one with share 1 when it is finished.
        planned: the optimiser steps of its whole run; 0 when it has not begun.
        diverged: what was NaN or Inf, or None.
        train_losses: step and mean nats per supervised token.
        seconds: what its training took.
        step: where it stands.
    """

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.rungs: list[Rung] = []
        self.planned = 0
        self.diverged: str | None = None
        self.train_losses: list[tuple[int, float]] = []
        self.seconds = 0.0
        self.step = 0

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return Path(self.configuration.recipe.output_dir) / RECORD_NAME

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
        self.planned, self.diverged = progress.planned, progress.diverged
        self.train_losses = list(progress.train_losses)
        self.seconds = progress.seconds
        self.step = progress.step
        if progress.diverged is None:
            losses = {name: list(rows) for name, rows in progress.losses.items()}
            self.rungs.append(Rung(share, progress.step, losses))
        values = {
            "changes": dict(self.configuration.changes),
            "planned": self.planned,
            "step": self.step,
            "diverged": self.diverged,
            "seconds": self.seconds,
            "rungs": [asdict(rung) for rung in self.rungs],
            "train_losses": self.train_losses,
        }
        atomic.write_file(self.path, json.dumps(values, ensure_ascii=False) + "\n")


def read_record(configuration: Configuration) -> Record:
    """The record of a configuration, an empty one where it has not begun.

    Raises:
        InputError: its file is damaged.
    """
    record = Record(configuration)
    if not record.path.is_file():
        return record
    try:
        values: dict[str, Any] = json.loads(record.path.read_text(encoding="utf-8"))
        record.planned, record.step = values["planned"], values["step"]
        record.diverged, record.seconds = values["diverged"], values["seconds"]
        record.rungs = [_rung(rung) for rung in values["rungs"]]
        record.train_losses = [(step, loss) for step, loss in values["train_losses"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{record.path} is damaged: remove it, and the configuration is evaluated again"
        ) from error
    return record


def _rung(values: dict[str, Any]) -> Rung:
    losses = {k: [(nats, tokens) for nats, tokens in rows] for k, rows in values["losses"].items()}
    return Rung(values["share"], values["step"], losses)


def mean_at(records: Sequence[Record], share: float, split: str) -> dict[str, float]:
    """The mean loss on a split, by name, of those that reached `share`."""
    return {
        record.configuration.name: mean_loss(rung.losses[split])
        for record in records
        if record.diverged is None and (rung := record.at(share)) is not None
    }
