"""What a run has consumed: kept in each checkpoint, so that a run that goes on counts on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

_COUNTS = "lorakit_counts.json"


@dataclass
class Counts:
    """What a run, all its processes, has consumed so far.

    Padding is not counted; `seconds` excludes evaluation.
    """

    train_tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0


def write_counts(checkpoint: Path, counts: Counts) -> None:
    """Writes them into a checkpoint that is being written."""
    (checkpoint / _COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")


def read_counts(checkpoint: Path) -> Counts:
    """What a run had consumed when `checkpoint` was written."""
    return Counts(**json.loads((checkpoint / _COUNTS).read_text("utf-8")))
