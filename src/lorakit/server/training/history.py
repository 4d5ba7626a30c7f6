"""The losses of a run over its steps, as `history.jsonl` in the run's folder: a line each step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lorakit.server.training.checkpoints import now
from lorakit.server.training.wire import Datum

_SHOWN = 500  # points of a curve


@dataclass(frozen=True)
class Point:
    """One step of the optimizer.

    Attributes:
        loss: of the passes since the step before, a mean over the tokens by their weights; a
            policy loss is a mean over tokens.
        tokens: that went through these passes.
        time: ISO 8601.
    """

    step: int
    loss: float | None
    tokens: int
    learning_rate: float
    grad_norm: float
    time: str


@dataclass
class History:
    """What happens in a run, from its last step on.

    Args:
        path: of the file; lines are added to one that is there.
    """

    path: Path
    steps: int = 0
    _loss: float = 0.0
    _weight: float = 0.0
    _tokens: int = 0

    def passed(self, data: Sequence[Datum], loss: float) -> None:
        """Rows have gone through a pass whose summed loss this is."""
        for datum in data:
            given = datum.inputs.get("weights")
            own = 0.0 if given is None else float(np.abs(given).sum())
            self._weight += own if given is not None else len(datum.tokens)
            self._tokens += len(datum.tokens)
        self._loss += loss

    def stepped(self, learning_rate: float, grad_norm: float) -> Point:
        """The optimizer has made a step; a line tells of it."""
        self.steps += 1
        mean = self._loss / self._weight if self._weight else None
        point = Point(
            self.steps,
            None if mean is None or not np.isfinite(mean) else mean,
            self._tokens,
            learning_rate,
            grad_norm,
            now().isoformat(),
        )
        self._loss, self._weight, self._tokens = 0.0, 0.0, 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(point)) + "\n")
        return point


def read_history(path: Path) -> list[Point]:
    """The points of a run, thinned to some hundreds; a line that was cut off is passed over."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    every = max(1, len(lines) // _SHOWN)
    for number, line in enumerate(lines):
        if number % every == 0 or number == len(lines) - 1:
            try:
                found.append(Point(**json.loads(line)))
            except (ValueError, TypeError):
                continue
    return found
