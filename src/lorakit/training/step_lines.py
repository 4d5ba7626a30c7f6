"""A file of JSON lines, one or more for a step, that goes on where a resumed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorakit import atomic


class StepLines:
    """JSON Lines whose objects have a `step`; the main process alone writes.

    Args:
        path: the file.
        writes: False in other processes, where nothing happens.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def begin(self, step: int) -> None:
        """Drops the lines of steps after `step`, which will be made again; all of them for 0."""
        if not self.writes:
            return
        kept = [line for line in self._lines() if step and _step_of(line) <= step]
        atomic.write_file(self.path, "".join(f"{line}\n" for line in kept))

    def append(self, values: dict[str, Any]) -> None:
        """Adds one line."""
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The objects of all whole lines; a line that a kill cut off is left out."""
        return [json.loads(line) for line in self._lines() if _step_of(line) < float("inf")]

    def _lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines()


def _step_of(line: str) -> float:
    """The step of one line; a line that a kill cut off belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
