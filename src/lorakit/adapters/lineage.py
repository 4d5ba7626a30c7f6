"""Adapters that come from others: the one that a run starts from, and frozen ones below it.

A stage of training either continues another adapter's values, and is then complete by itself, or
trains a new one on top of it, which is frozen and has to be there whenever the new one is used.
Each link is recorded with a hash, so that another adapter in its place is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from lorakit import atomic
from lorakit.adapters.adapter_files import AdapterFiles, read_files
from lorakit.adapters.manifest import FrozenRecord, ParentRecord, read_manifest
from lorakit.commands import quoted
from lorakit.errors import InputError
from lorakit.lora.checkpoint import read_config, weights_file
from lorakit.lora.locate import CONFIG_NAME, INITIAL_NAME

Mode = Literal["continue", "freeze"]
STAGE_NAME = "lorakit_stage.json"
"""What a checkpoint is added to; a finished adapter's record says it itself."""

_ADDED = "This adapter is added to the frozen adapter"

ON_TOP = "was trained on top of"

State = Literal["unchanged", "changed", "missing"]
_RECORDS = TypeAdapter(list[FrozenRecord])


@dataclass(frozen=True)
class Start:
    """The adapter that a run starts from.

    Attributes:
        files: what its folder holds.
        record: what the new adapter's record says of it.
        below: the frozen adapters that it is added to itself.
    """

    files: AdapterFiles
    record: ParentRecord
    below: tuple[FrozenRecord, ...] = ()

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.files.folder

    @property
    def frozen(self) -> tuple[FrozenRecord, ...]:
        """What the new adapter is added to: this one with `freeze`, and those below it."""
        own = FrozenRecord(path=self.record.path, sha256=self.record.sha256)
        return (own, *self.below) if self.record.mode == "freeze" else self.below


def read_start(folder: str | Path, mode: Mode, base: str | None = None) -> Start:
    """Reads the adapter in `folder` as the start of a run.

    Args:
        base: the base model of the run; None is the recorded one.

    Raises:
        InputError: there is no usable adapter, or one below it is missing or has changed.
    """
    files, manifest = read_files(folder, base), read_manifest(folder)
    record = ParentRecord(
        path=str(folder),
        sha256=digest(folder),
        mode=mode,
        parent=manifest.parent if manifest else None,
    )
    below = [
        FrozenRecord(path=str(place), sha256=own.sha256)
        for place, own in zip(frozen_below(folder), standing_on(folder), strict=True)
    ]
    return Start(files, record, tuple(below))


def digest(folder: str | Path) -> str:
    """SHA-256 of an adapter: of its configuration, its weights, and its initial factors if any.

    Raises:
        InputError: there is no adapter in `folder`.
    """
    read_config(folder)
    total = hashlib.sha256()
    for path in (Path(folder) / CONFIG_NAME, weights_file(folder), Path(folder) / INITIAL_NAME):
        if path.is_file():
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def standing_on(folder: str | Path) -> list[FrozenRecord]:
    """What is recorded of the frozen adapters that the one in `folder` is added to.

    Raises:
        InputError: the record is damaged.
    """
    if manifest := read_manifest(folder):
        return list(manifest.stands_on)
    path = Path(folder) / STAGE_NAME
    if not path.is_file():
        return []
    try:
        return _RECORDS.validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise InputError(f"{path} is damaged: use another checkpoint") from error


def write_stage(folder: Path, below: Sequence[FrozenRecord]) -> None:
    """Records in a checkpoint's folder which frozen adapters it is added to."""
    records = [record.model_dump(mode="json") for record in below]
    atomic.write_file(folder / STAGE_NAME, json.dumps(records, indent=1) + "\n")


def name_frozen(folder: Path, below: Sequence[FrozenRecord]) -> None:
    """Says in an adapter's card which frozen adapters it is added to."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if text and _ADDED not in text:
        names = ", ".join(f"`{record.path}`" for record in below)
        said = (
            f"{_ADDED} {names}, without which it is another model: lorakit loads both, and "
            "`lorakit combine THIS FROZEN --weights 1,1 --method cat` makes one of them."
        )
        atomic.write_file(card, f"{text.rstrip()}\n\n{said}\n")


def frozen_below(folder: str | Path) -> list[Path]:
    """The folders of the frozen adapters that the one in `folder` is added to.

    Raises:
        InputError: one of them is missing, or is not the one that it was.
    """
    return [require_unchanged(record, folder) for record in standing_on(folder)]


def require_unchanged(
    record: FrozenRecord, child: str | Path, relation: str = ON_TOP, otherwise: str = ""
) -> Path:
    """Where a recorded adapter lies now; it must be as it was.

    Args:
        relation: what `child` has to do with it, as a verb.
        otherwise: another cure than to put it back.

    Raises:
        InputError: it is missing, or is not the one that it was.
    """
    place, state = whereabouts(record, child)
    if state != "unchanged":
        raise unusable(record, child, state, relation, otherwise)
    return place


def unusable(
    record: FrozenRecord,
    child: str | Path,
    state: State,
    relation: str = ON_TOP,
    otherwise: str = "",
) -> InputError:
    """The error where an adapter that `child` needs is missing, or is not what it was.

    Arguments as in `require_unchanged`.
    """
    cure = "is missing: put its folder back there, or beside this one"
    if state == "changed":
        cure = f"is another one now (sha256 of its files): put back that of {record.sha256[:12]}"
    return InputError(f"{child} {relation} the adapter {record.path}, which {cure}{otherwise}")


def places(record: FrozenRecord, child: str | Path) -> list[Path]:
    """Where a recorded adapter may lie: where it was, or beside `child` or the run it is of."""
    there, own = Path(record.path), Path(child).absolute()
    return [there, own.parent / there.name, own.parent.parent / there.name]


def whereabouts(record: FrozenRecord, child: str | Path) -> tuple[Path, State]:
    """Where a recorded adapter lies now: where it was, or beside `child`; and its state there."""
    state: State = "missing"
    for place in places(record, child):
        try:
            if digest(place) == record.sha256:
                return place, "unchanged"
            state = "changed"
        except (InputError, OSError):
            continue
    return Path(record.path), state


def chain(folder: str | Path) -> Iterator[tuple[ParentRecord, State]]:
    """The adapters that the one in `folder` came from, the nearest first, and their states."""
    manifest = read_manifest(folder)
    record = manifest.parent if manifest else None
    while record is not None:
        yield record, whereabouts(record, folder)[1]
        record = record.parent


def require_complete(folder: str | Path, beside: Sequence[str | Path] = (), verb: str = "") -> None:
    """Raises InputError for an adapter that is added to frozen ones which are not among `beside`.

    Args:
        verb: what cannot be done with it alone, as in "resized".
    """
    if not (needed := standing_on(folder)):
        return
    given = {digest(other) for other in beside}
    if lacking := [record for record in needed if record.sha256 not in given]:
        raise InputError(
            f"{folder} was trained on top of {lacking[0].path} and cannot be {verb} without it: "
            f"join them first ({join_command(folder)})"
        )


def join_command(folder: str | Path) -> str:
    """The command that makes one adapter of the one in `folder` and those that it is added to."""
    folders = [Path(folder), *(Path(record.path) for record in standing_on(folder))]
    weights = ",".join("1" for _ in folders)
    places = " ".join(quoted(place) for place in folders)
    output = quoted(f"{folder}-joined")
    return f"lorakit combine {places} --weights {weights} --method cat -o {output}"
