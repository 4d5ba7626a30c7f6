"""The output folder of a run: who may write into it, and what resuming a run requires."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lorakit import atomic
from lorakit.adapters.manifest import MANIFEST_NAME, Manifest
from lorakit.data.template_clock import Rendering
from lorakit.errors import InputError, listed
from lorakit.folder_lock import LOCK_NAME
from lorakit.training.continuing import change_of
from lorakit.training.differences import Difference, run_differences, run_identity

RUN_NAME = "lorakit-run.json"
_CONTINUED = "continued"


def check_output(
    folder: Path,
    *,
    resume: bool,
    marker: str = RUN_NAME,
    finished: str = MANIFEST_NAME,
    what: str = "run",
) -> None:
    """Raises InputError unless a run may start, or with `resume` go on, in `folder`.

    Args:
        marker, finished: the files that tell a run's folder, and a finished one.
        what: what a run is called.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir: {folder} is a file")
    if not folder.is_dir() or not any(not left_over(path) for path in folder.iterdir()):
        return
    if not (folder / marker).is_file():
        raise InputError(f"output_dir: {folder} holds something else: give an empty or new folder")
    if not resume:
        state = "a finished" if (folder / finished).is_file() else "an unfinished"
        raise InputError(
            f"output_dir: {folder} holds {state} {what}: add --resume to resume it, "
            "or give another folder"
        )


def changes_since(folder: Path, now: dict[str, Any]) -> list[Difference]:
    """Where the run in `folder` differs from the identity `now`; nothing where there is no run.

    Raises:
        InputError: its record is damaged.
    """
    before = _read_run(folder)
    return run_differences(before, now) if before else []


def require_unchanged(changes: Sequence[Difference], folder: Path) -> None:
    """Raises InputError where a run that is resumed differs from the one in `folder`."""
    if not changes:
        return
    cures = ["Give the same ones", "start again in another folder"]
    if not any(change_of(change.key).effect == "refused" for change in changes):
        cures.append("accept the difference with --continue")
    raise InputError(
        f"the run in {folder} cannot be resumed with another recipe, other data or other "
        f"processes: {listed([change.line for change in changes], 4)}. "
        f"{', '.join(cures[:-1])}, or {cures[-1]}"
    )


def claim_output(
    folder: Path,
    now: dict[str, Any],
    changes: Sequence[Difference] = (),
    *,
    step: int = 0,
    also: Sequence[str] = (),
) -> None:
    """Marks `folder` as this run's, and records what changed; no longer is it a finished one's.

    Args:
        now: the run's identity.
        step: the one that the run is resumed from.
        also: what else is not as in an undisturbed run.
    """
    before = _read_run(folder)
    if before and not changes and not also:
        return
    continued = before.get(_CONTINUED, [])
    if changes or also:
        keys = [change.key for change in changes]
        lines = [*(change.line for change in changes), *also]
        continued = [*continued, {"step": step, "changes": lines, "keys": keys}]
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
    record = {**now, _CONTINUED: continued} if continued else now
    text = json.dumps(record, indent=2, ensure_ascii=False)
    atomic.write_file(folder / RUN_NAME, text + "\n")


def require_data(expected: list[dict[str, Any]], data: list[dict[str, Any]]) -> None:
    """Raises InputError unless `data` are the rows that are `expected`, wherever they lie."""
    before, now = ({"recipe": {}, "data": facts} for facts in (expected, data))
    if changes := run_differences(before, now):
        lines = [change.line for change in changes]
        raise InputError(f"the data differ from those of the run: {listed(lines, 4)}")


def require_environment(expected: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Raises InputError unless the files of environment and tools are those `expected`."""
    if changed := [name for name in expected if expected[name] != files.get(name)]:
        raise InputError(
            f"these files of the environment differ from those of the run: {listed(changed)}"
        )


def require_rewards(expected: list[dict[str, Any]], rewards: list[dict[str, Any]]) -> None:
    """Raises InputError unless the files of the rewards are those that are `expected`."""
    before, now = ({one["name"]: one["sha256"] for one in facts} for facts in (expected, rewards))
    if changed := [name for name in before if before[name] != now.get(name)]:
        raise InputError(f"the files of these rewards differ from those of the run: {changed}")


def same_run(manifest: Manifest, now: dict[str, Any]) -> bool:
    """Whether the finished run of `manifest` has the identity `now`."""
    before = run_identity(
        manifest.recipe,
        manifest.data,
        manifest.processes,
        manifest.base_fingerprint,
        manifest.template_sha256,
        parent=manifest.parent.sha256 if manifest.parent else None,
        teacher=manifest.teacher.sha256 if manifest.teacher else None,
        rewards=manifest.rewards,
        environment=manifest.environment,
    )
    return not run_differences(before, now)


def read_continued(folder: Path) -> list[dict[str, Any]]:
    """The steps from which the run in `folder` went on with other values, and what changed."""
    found: list[dict[str, Any]] = _read_run(folder).get(_CONTINUED, [])
    return found


def rendering_of(folder: Path) -> Rendering | None:
    """How the run in `folder` reads the clock in its chat template; None where it does not.

    Raises:
        InputError: its record is damaged.
    """
    time = _read_run(folder).get("template_time")
    try:
        return Rendering(time=datetime.fromisoformat(time)) if time else None
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{folder / RUN_NAME} is damaged: start again in another folder"
        ) from error


def changed_since(folder: Path, step: int) -> list[str]:
    """The keys that have changed since the checkpoint of `step` was written."""
    return [
        key
        for entry in read_continued(folder)
        if entry["step"] >= step
        for key in entry.get("keys", ())
    ]


def _read_run(folder: Path) -> dict[str, Any]:
    """The record of the run in `folder`, empty where there is none."""
    path = folder / RUN_NAME
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {"processes": 1, **values, "recipe": dict(values["recipe"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged: start again in another folder") from error


def left_over(path: Path) -> bool:
    """Whether `path` is no content: a lock, or a file that a kill left half-written."""
    return path.name == LOCK_NAME or (path.name.startswith(".") and path.name.endswith(".tmp"))
