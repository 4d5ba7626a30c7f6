"""The output folder of a run: who may write into it, and what going on with a run requires."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit import atomic
from lorakit.adapters.manifest import MANIFEST_NAME, Manifest
from lorakit.errors import InputError, listed
from lorakit.folder_lock import LOCK_NAME

RUN_NAME = "lorakit-run.json"
_CONTINUED = "continued"


def check_output(folder: Path, *, resume: bool) -> None:
    """Raises InputError unless a run may start, or with `resume` go on, in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir: {folder} is a file")
    if not folder.is_dir() or not any(not left_over(path) for path in folder.iterdir()):
        return
    if not (folder / RUN_NAME).is_file():
        raise InputError(f"output_dir: {folder} holds something else: give an empty or new folder")
    if not resume:
        what = "a finished run" if (folder / MANIFEST_NAME).is_file() else "an unfinished run"
        raise InputError(
            f"output_dir: {folder} holds {what}: add --resume to go on with it, "
            "or give another folder"
        )


def claim_output(
    folder: Path,
    recipe: dict[str, Any],
    data: list[dict[str, Any]],
    processes: int = 1,
    *,
    step: int = 0,
    accept_changes: bool = False,
) -> list[str]:
    """Marks `folder` as this run's; when it is already, recipe and data must be the same.

    Args:
        processes: so many make the run, which decides how many rows a step has.
        step: the one that the run goes on from.
        accept_changes: let them differ. What differed is kept, and what had been finished no
            longer counts as that.

    Returns: what differs.

    Raises:
        InputError: the run in `folder` had another recipe, other data or other processes.
    """
    now = _identity(recipe, data, processes)
    path = folder / RUN_NAME
    changes: list[str] = []
    if path.is_file():
        try:
            before = {"processes": 1, **json.loads(path.read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged: start anew in another folder") from error
        continued = before.pop(_CONTINUED, [])
        changes = list(differences(_as_json(before), _as_json(now)))
        if changes and not accept_changes:
            raise InputError(
                f"the run in {folder} cannot go on with another recipe, other data or other "
                f"processes: {listed(changes, 4)}. Give the same ones, start anew in another "
                "folder, or accept the difference with --continue"
            )
        if not changes:
            return []
        now[_CONTINUED] = [*continued, {"step": step, "changes": changes}]
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
    atomic.write_file(path, json.dumps(now, indent=2, ensure_ascii=False) + "\n")
    return changes


def require_data(expected: list[dict[str, Any]], data: list[dict[str, Any]]) -> None:
    """Raises InputError unless `data` are the files and rows that are `expected`."""
    if changes := list(differences({"data": expected}, _as_json({"data": data}))):
        raise InputError(f"the data are not those that were learned: {listed(changes, 4)}")


def same_run(
    manifest: Manifest, recipe: dict[str, Any], data: list[dict[str, Any]], processes: int
) -> bool:
    """Whether the finished run of `manifest` had this recipe, these data and processes."""
    before = _identity(manifest.recipe, manifest.data, manifest.processes)
    return not any(differences(_as_json(before), _as_json(_identity(recipe, data, processes))))


def read_continued(folder: Path) -> list[dict[str, Any]]:
    """The steps from which the run in `folder` went on with other values, and what changed."""
    path = folder / RUN_NAME
    return json.loads(path.read_text(encoding="utf-8")).get(_CONTINUED, [])


def _identity(recipe: dict[str, Any], data: list[dict[str, Any]], processes: int) -> dict[str, Any]:
    kept = {k: v for k, v in recipe.items() if k != "output_dir"}
    return {"recipe": kept, "data": data, "processes": processes}


def left_over(path: Path) -> bool:
    """Whether `path` is no content: a lock, or a file that a kill left half-written."""
    return path.name == LOCK_NAME or (path.name.startswith(".") and path.name.endswith(".tmp"))


def _as_json(values: dict[str, Any]) -> Any:
    return json.loads(json.dumps(values))


def differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            inner = f"{key}.{name}".removeprefix(".").removeprefix("recipe.")
            yield from differences(before.get(name), now.get(name), inner)
    elif before != now:
        yield f"{key} was {before!r} and is {now!r}"
