"""Saved weights of training runs: PEFT folders below a state folder, by `tinker://` paths.

    runs/RUN/run.json                      what the run is
    runs/RUN/weights/NAME                  adapter and optimizer, to train on
    runs/RUN/sampler_weights/NAME          adapter, to sample from
    runs/RUN/external_weights/NAME         adapter, to download

A checkpoint appears in one step, and has `checkpoint.json` beside the adapter's files. One that is
overwritten is set aside for the moment in which the new one takes its name; where the server was
killed in that moment, the old one is back when it starts again.
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
from lorakit.server.keys import Caller
from lorakit.server.training.quotas import DiskQuota

_RECORD, _RUN = "checkpoint.json", "run.json"
_ASIDE, _FRESH = "aside", "fresh"  # the ends of the names of an old and a new folder
KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
"""A folder's name, and what the SDK calls what is in it."""
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,199}\Z")


@dataclass(frozen=True)
class Run:
    """A training run, as its file has it.

    Attributes:
        owner: whose it is (`Caller.owner`).
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
        kind: of `KINDS`.
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
    """The runs and checkpoints below a folder, which stays theirs over restarts.

    Args:
        quota: how much of it each owner has.
    """

    def __init__(self, folder: Path, quota: DiskQuota) -> None:
        self.state, self._folder, self._quota = folder, folder / "runs", quota
        self._folder.mkdir(parents=True, exist_ok=True)
        self._recover()
        found = (self._run(place) for place in self._folder.iterdir())
        self._runs = {run.run_id: run for run in found if run is not None}
        for run in self.runs():
            for checkpoint in self.checkpoints(run.run_id):
                quota.count(run.owner, self.size(checkpoint))

    # --- runs -----------------------------------------------------------------------------

    def write_run(self, run: Run) -> None:
        """Records a run, or its newer state."""
        place = self._place(run.run_id)
        place.mkdir(parents=True, exist_ok=True)
        atomic.write_file(place / _RUN, json.dumps(asdict(run), indent=1))
        self._runs[run.run_id] = run

    def runs(self, caller: Caller | None = None) -> list[Run]:
        """The runs that a caller sees, all without one; the newest first."""
        every = [*self._runs.values()]  # others may write one meanwhile
        own = [run for run in every if caller is None or caller.sees(run.owner)]
        return sorted(own, key=lambda run: run.created, reverse=True)

    def run(self, run_id: str, caller: Caller | None = None) -> Run:
        """A run that a caller sees.

        Raises:
            InputError: there is none.
        """
        found = self._runs.get(run_id)
        if found is None or not (caller is None or caller.sees(found.owner)):
            raise InputError(f"there is no training run {run_id!r}")
        return found

    def history(self, run_id: str) -> Path:
        """Where a run's losses are."""
        return self._place(run_id) / "history.jsonl"

    # --- checkpoints ----------------------------------------------------------------------

    def save(
        self, checkpoint: Checkpoint, write: Callable[[Path], None], overwrite: bool = False
    ) -> None:
        """Adds a checkpoint, whose files `write` writes into a folder.

        Raises:
            InputError: there is one of this name, and it is not to be overwritten; or its owner
                has no room for it.
        """
        place = self.folder(checkpoint)
        there = place.exists()
        if there and not overwrite:
            raise InputError(f"{checkpoint.path} exists already: take another name")
        owner = self.run(checkpoint.run_id).owner
        old, taken = _size(place) if there else 0, 0
        fresh, aside = _beside(place, _FRESH), _beside(place, _ASIDE)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic.new_folder(fresh) as temporary:
                write(temporary)
                (temporary / _RECORD).write_text(json.dumps(asdict(checkpoint), indent=1))
                more = _size(temporary) - old
                self._quota.take(owner, more)
                taken = more
            if there:
                place.rename(aside)
            fresh.rename(place)
        except BaseException:
            self._quota.count(owner, -taken)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def change(self, checkpoint: Checkpoint, **values: Any) -> Checkpoint:
        """Sets `public` or `expires`."""
        changed = replace(checkpoint, **values)
        atomic.write_file(self.folder(changed) / _RECORD, json.dumps(asdict(changed), indent=1))
        return changed

    def delete(self, checkpoint: Checkpoint) -> None:
        """Removes a checkpoint's files."""
        size = self.size(checkpoint)
        shutil.rmtree(self.folder(checkpoint))
        self._quota.take(self.run(checkpoint.run_id).owner, -size)

    def find(self, path: str, caller: Caller) -> Checkpoint:
        """The checkpoint at a `tinker://` path, of a caller's or published.

        Raises:
            InputError: there is none, or no more.
        """
        run_id, kind, name = parse(path)
        found = self._checkpoint(self._place(run_id) / kind / name)
        run = self._runs.get(run_id)
        mine = run is not None and caller.sees(run.owner)
        if found is None or found.is_expired() or not (mine or found.public):
            raise InputError(f"there is no checkpoint {path}")
        return found

    def checkpoints(self, run_id: str) -> list[Checkpoint]:
        """Those of a run, the newest first."""
        places = [p for kind in KINDS for p in (self._place(run_id) / kind).glob("*")]
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

    def files(self, checkpoint: Checkpoint) -> list[Path]:
        """Its files, without the record of the checkpoint."""
        return sorted(f for f in self.folder(checkpoint).iterdir() if f.name != _RECORD)

    def size(self, checkpoint: Checkpoint) -> int:
        """How many bytes its files have."""
        return _size(self.folder(checkpoint))

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
        if not _PART.match(place.name):  # it is being written
            return None
        try:
            return Checkpoint(**json.loads((place / _RECORD).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _recover(self) -> None:
        """Puts back what was set aside, and removes what was not finished, by a killed server."""
        for place in self._folder.glob(f"*/*/.*.{_ASIDE}"):
            name = place.name[1 : -len(_ASIDE) - 1]
            if place.with_name(name).exists():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.rename(place.with_name(name))
        for place in (*self._folder.glob(f"*/*/.*.{_FRESH}"), *self._folder.glob("*/*/.*.tmp")):
            shutil.rmtree(place, ignore_errors=True)


def _beside(place: Path, end: str) -> Path:
    """A name that no checkpoint has."""
    return place.with_name(f".{place.name}.{end}")


def _size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    except OSError:  # it goes away
        return 0
