"""Saved weights of training runs: PEFT folders below a state folder, by `tinker://` paths.

    runs/RUN/run.json                      what the run is
    runs/RUN/weights/NAME                  adapter and optimizer, to train on
    runs/RUN/sampler_weights/NAME          adapter, to sample from

A checkpoint appears in one step, and has `checkpoint.json` beside the adapter's files.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lorakit import atomic
from lorakit.errors import InputError

_RECORD, _RUN = "checkpoint.json", "run.json"
KINDS = {"weights": "training", "sampler_weights": "sampler"}
"""A folder's name, and what the SDK calls what is in it."""
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,199}\Z")


@dataclass(frozen=True)
class Run:
    """A training run, as its file has it.

    Attributes:
        owner: whose it is: a digest of the key.
        lora: rank, seed and what is trained.
        times: ISO 8601.
    """

    run_id: str
    owner: str
    base_model: str
    lora: dict[str, Any]
    user_metadata: dict[str, Any] | None
    created: str
    last_request: str


@dataclass(frozen=True)
class Checkpoint:
    """Saved weights.

    Attributes:
        kind: `weights` or `sampler_weights`.
        expires: ISO 8601; None is never.
    """

    run_id: str
    kind: str
    name: str
    created: str
    public: bool = False
    expires: str | None = None
    user_metadata: dict[str, str] | None = None

    @property
    def path(self) -> str:
        """Its `tinker://` path."""
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        """Its name within the run, with a slash."""
        return f"{self.kind}/{self.name}"

    def is_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.fromisoformat(self.expires) <= now()


def now() -> datetime:
    """The present, in UTC."""
    return datetime.now(UTC)


def expiry(seconds: int | None) -> str | None:
    """The time in so many seconds, None for never."""
    return None if seconds is None else (now() + timedelta(seconds=seconds)).isoformat()


def parse(path: str) -> tuple[str, str, str]:
    """Run, kind and name of a `tinker://` path.

    Raises:
        InputError: it is none.
    """
    parts = path.removeprefix("tinker://").split("/")
    well = path.startswith("tinker://") and len(parts) == 3 and parts[1] in KINDS
    if not well or not all(_PART.match(part) for part in parts):
        raise InputError(f"{path!r} is not a path tinker://RUN/weights/NAME or …/sampler_weights/…")
    return parts[0], parts[1], parts[2]


class Store:
    """The runs and checkpoints below a folder, which stays theirs over restarts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "runs"
        self._folder.mkdir(parents=True, exist_ok=True)

    # --- runs -----------------------------------------------------------------------------

    def write_run(self, run: Run) -> None:
        """Records a run, or its newer state."""
        place = self._place(run.run_id)
        place.mkdir(parents=True, exist_ok=True)
        atomic.write_file(place / _RUN, json.dumps(asdict(run), indent=1))

    def runs(self, owner: str | None) -> list[Run]:
        """The runs of an owner, of all without one; the newest first."""
        found = [run for place in self._folder.iterdir() if (run := self._run(place))]
        own = [run for run in found if owner in (None, run.owner)]
        return sorted(own, key=lambda run: run.created, reverse=True)

    def run(self, run_id: str, owner: str | None) -> Run:
        """A run of an owner's.

        Raises:
            InputError: there is none.
        """
        found = self._run(self._place(run_id))
        if found is None or owner not in (None, found.owner):
            raise InputError(f"there is no training run {run_id!r}")
        return found

    # --- checkpoints ----------------------------------------------------------------------

    def save(
        self, checkpoint: Checkpoint, write: Callable[[Path], None], overwrite: bool = False
    ) -> None:
        """Adds a checkpoint, whose files `write` writes into a folder.

        Raises:
            InputError: there is one of this name, and it is not to be overwritten.
        """
        place = self.folder(checkpoint)
        if place.exists():
            if not overwrite:
                raise InputError(f"{checkpoint.path} exists already: take another name")
            shutil.rmtree(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic.new_folder(place) as temporary:
            write(temporary)
            (temporary / _RECORD).write_text(json.dumps(asdict(checkpoint), indent=1))

    def change(self, checkpoint: Checkpoint, **values: Any) -> Checkpoint:
        """Sets `public` or `expires`."""
        changed = replace(checkpoint, **values)
        atomic.write_file(self.folder(changed) / _RECORD, json.dumps(asdict(changed), indent=1))
        return changed

    def delete(self, checkpoint: Checkpoint) -> None:
        """Removes a checkpoint's files."""
        shutil.rmtree(self.folder(checkpoint))

    def find(self, path: str, owner: str | None) -> Checkpoint:
        """The checkpoint at a `tinker://` path, of an owner's or published.

        Raises:
            InputError: there is none, or no more.
        """
        run_id, kind, name = parse(path)
        found = self._checkpoint(self._place(run_id) / kind / name)
        run = self._run(self._place(run_id))
        mine = run is not None and owner in (None, run.owner)
        if found is None or found.is_expired() or not (mine or found.public):
            raise InputError(f"there is no checkpoint {path}")
        return found

    def checkpoints(self, run_id: str) -> list[Checkpoint]:
        """Those of a run, the newest first."""
        places = (p for kind in KINDS for p in (self._place(run_id) / kind).glob("*"))
        found = [one for place in places if (one := self._checkpoint(place))]
        return sorted((c for c in found if not c.is_expired()), key=lambda c: c.created)[::-1]

    def expired(self) -> Iterator[Checkpoint]:
        """Those whose time is over."""
        for place in self._folder.glob("*/*/*"):
            found = self._checkpoint(place)
            if found is not None and found.is_expired():
                yield found

    def folder(self, checkpoint: Checkpoint) -> Path:
        """Where a checkpoint's files are."""
        return self._place(checkpoint.run_id) / checkpoint.kind / checkpoint.name

    def size(self, checkpoint: Checkpoint) -> int:
        """How many bytes its files have."""
        return sum(f.stat().st_size for f in self.folder(checkpoint).iterdir() if f.is_file())

    # --- inside ---------------------------------------------------------------------------

    def _place(self, run_id: str) -> Path:
        if not _PART.match(run_id):
            raise InputError(f"there is no training run {run_id!r}")
        return self._folder / run_id.replace(":", "+")

    def _run(self, place: Path) -> Run | None:
        try:
            return Run(**json.loads((place / _RUN).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _checkpoint(self, place: Path) -> Checkpoint | None:
        try:
            return Checkpoint(**json.loads((place / _RECORD).read_text()))
        except (OSError, ValueError, TypeError):
            return None
