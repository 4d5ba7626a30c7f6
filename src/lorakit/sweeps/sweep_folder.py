"""The folder of a sweep: who may write into it, what resuming requires, the disk it takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit import atomic
from lorakit.errors import InputError, listed
from lorakit.folder_lock import require_unlocked
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.space.sweep_settings import SweepSettings
from lorakit.training.differences import Difference, differences, overlook_moves
from lorakit.training.output import check_output
from lorakit.training.recipe import Recipe

SWEEP_NAME = "sweep.json"
LEADERBOARD_NAME = "leaderboard.json"
RECIPE_NAME = "recipe.yaml"

_ADAPTER, _OPTIMISER = 4, 8  # bytes a parameter: float32, and Adam's two moments


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raises InputError unless a sweep may start, or be resumed, in `folder`."""
    check_output(folder, resume=resume, marker=SWEEP_NAME, finished=LEADERBOARD_NAME, what="sweep")
    if folder.is_dir():
        for part in folder.iterdir():
            require_unlocked(part)  # a configuration that somebody trains by itself


def require_same(
    folder: Path,
    recipe: Recipe,
    settings: SweepSettings,
    ground: Mapping[str, Any] | None = None,
) -> bool:
    """Whether `folder` is a sweep's; then all that decides it must be the same.

    Args:
        ground: what rows and base are, None where they are not known yet.
    """
    path = folder / SWEEP_NAME
    if not path.is_file():
        return False
    now = _identity(recipe, settings, ground)
    try:
        changes = _changes(json.loads(path.read_text(encoding="utf-8")), now)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: start again in another folder") from error
    if changes:
        lines = [change.line for change in changes]
        raise InputError(
            f"the sweep in {folder} cannot be resumed with other values: {listed(lines, 4)}. "
            "Give the same ones, or another folder"
        )
    return True


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """Where two sweeps differ, wherever their data and their base model lie."""
    if "ground" in now:
        sides = [{"recipe": side["recipe"], **side["ground"]} for side in (before, now)]
        if all(isinstance(side["data"], list) for side in sides):
            overlook_moves(*sides)
        return list(differences(before, now))
    # Whether another path is another place of the same is known with the data and the base.
    known = [json.loads(json.dumps({k: side[k] for k in now})) for side in (before, now)]
    for side in known:
        side["recipe"].pop("model", None)
        for name in ("train", "eval"):
            side["recipe"]["data"].pop(name, None)
    return list(differences(*known))


def claim_folder(
    folder: Path, recipe: Recipe, settings: SweepSettings, ground: Mapping[str, Any]
) -> None:
    """Marks `folder` as this sweep's; arguments and errors as in `require_same`."""
    if not require_same(folder, recipe, settings, ground):
        text = json.dumps(_identity(recipe, settings, ground), indent=2, ensure_ascii=False)
        atomic.write_file(folder / SWEEP_NAME, text + "\n")


def _identity(
    recipe: Recipe, settings: SweepSettings, ground: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All that decides a sweep's numbers, as JSON has it."""
    values = recipe.model_dump(mode="json", exclude_unset=True, exclude={"output_dir"})
    asked = settings.model_dump(mode="json", exclude={"engine", "workers"})
    known = {} if ground is None else {"ground": ground}
    return json.loads(json.dumps({"recipe": values, "sweep": asked, **known}))


def check_disk(
    folder: Path,
    configurations: Sequence[Configuration],
    parameters: Callable[[Recipe], int],
    total: int,
) -> None:
    """Raises InputError where the disk has no room for all adapters and their checkpoints.

    Args:
        parameters: how many a configuration trains.
        total: configurations of the whole sweep, of which these are the first.
    """
    needed = 0
    for configuration in configurations:
        if Path(configuration.recipe.output_dir).is_dir():
            continue  # it has taken its room
        kept = (configuration.recipe.training.save_total_limit or 10) + 1  # one is being written
        trained = parameters(configuration.recipe)
        needed += trained * (_ADAPTER + kept * (_ADAPTER + _OPTIMISER))
    needed = needed * max(1, total // max(1, len(configurations)))
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"output_dir: {total} configurations with their checkpoints take "
            f"{needed / 1e9:,.1f} GB and {place} has {free / 1e9:,.1f} GB free: sweep fewer, or "
            "lower training.save_total_limit or the ranks"
        )
