"""Whole checkpoints: sealed with the sizes and hashes of their files, and read if all match.

A run is resumed from the newest whole one; newer damaged ones are named with the reason. How a
checkpoint is written and taken up is `trainer.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit import atomic

SEAL_NAME = "lorakit_checkpoint.json"

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Found:
    """What to resume from.

    Attributes:
        checkpoint: the newest whole one; None where there is none.
        damaged: a line for each newer one that is not whole.
    """

    checkpoint: Path | None = None
    damaged: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The optimiser step at which it was written; 0 without one."""
        return step_of(self.checkpoint) if self.checkpoint else 0


def step_of(checkpoint: Path) -> int:
    """The optimiser step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, the newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in paths if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def newest_whole(folder: Path, at_most: int | None = None) -> Found:
    """The newest whole checkpoint in a run's folder; one in the staging folder does not count.

    Args:
        at_most: look only at those of this step and before.
    """
    damaged: list[str] = []
    for checkpoint in checkpoints(folder):
        if at_most is not None and step_of(checkpoint) > at_most:
            continue
        if (reason := damage(checkpoint)) is None:
            return Found(checkpoint, damaged)
        damaged.append(f"{checkpoint.name} is not whole and is not used: {reason}")
    return Found(None, damaged)


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Writes the sizes and hashes of all files, which are on the disk then, and `facts`."""
    files = {
        path.relative_to(checkpoint).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path, to_disk=True),
        }
        for path in sorted(p for p in checkpoint.rglob("*") if p.is_file())
    }
    values = {**facts, "files": files}
    text = json.dumps({**values, "sha256": _of_values(values)}, indent=1)
    atomic.write_file(checkpoint / SEAL_NAME, text + "\n")


def read_seal(checkpoint: Path) -> dict[str, Any]:
    """What `seal` wrote; empty where it is missing or damaged."""
    try:
        values = json.loads((checkpoint / SEAL_NAME).read_text(encoding="utf-8"))
        own = values.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return values if own == _of_values(values) else {}


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, naming the file; None where every file is as it was sealed."""
    values = read_seal(checkpoint)
    if not values:
        state = "is damaged" if (checkpoint / SEAL_NAME).exists() else "is missing"
        return f"{SEAL_NAME}, which is written last, {state}"
    try:
        for name, file in values["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != file["bytes"]:
                return f"{name} has {size} of {file['bytes']} bytes"
            if _sha256(path) != file["sha256"]:
                return f"{name} has other content than was written"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    return None


def _of_values(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path, *, to_disk: bool = False) -> str:
    with path.open("rb") as file:
        if to_disk:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
