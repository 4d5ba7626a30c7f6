"""The table of a sweep as plain JSON types, in `leaderboard.json`: all that its page shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit import atomic
from lorakit.errors import InputError
from lorakit.sweeps.choosing.bootstrap import loss_interval
from lorakit.sweeps.choosing.objective import Objective
from lorakit.sweeps.choosing.ranks import RankChoice
from lorakit.sweeps.choosing.standings import Standing, verdict
from lorakit.sweeps.output import LEADERBOARD_NAME
from lorakit.sweeps.row_losses import SplitLosses
from lorakit.sweeps.space.settings import SweepSettings
from lorakit.version import __version__


def leaderboard(
    found: Sequence[Standing],
    objective: Objective,
    settings: SweepSettings,
    base: SplitLosses,
    ranks: RankChoice | None,
    notices: Sequence[str],
) -> dict[str, Any]:
    """Everything that is told of a finished sweep.

    Args:
        base: the losses of the bare base.
        ranks: the winner at smaller ranks.
        notices: lines that were shown as warnings.
    """
    ground = objective.ground
    planned, done = (sum(getattr(s.record, key) for s in found) for key in ("planned", "step"))
    return {
        "lorakit": __version__,
        "model": ground.recipe.model,
        "sweep": settings.model_dump(mode="json"),
        "objective": objective.name,
        "verdict": verdict(found, objective),
        "winner": found[0].name,
        "rows": {
            "train": len(ground.begun.data.train),
            **{name: len(part.rows) for name, part in ground.splits.items()},
        },
        "prompts": {name: max(part.units) + 1 for name, part in ground.splits.items()},
        "base": {
            name: loss_interval(base[name], part.units, objective.seed).to_dict()
            for name, part in ground.splits.items()
        },
        "steps": {"planned": planned, "done": done, "saved": 1 - done / planned},
        "seconds": round(sum(s.record.seconds for s in found), 2),
        "ranks": ranks and {**ranks.to_dict(), "line": ranks.line},
        "notices": list(notices),
        "configurations": [standing.to_dict() for standing in found],
    }


def write_leaderboard(folder: Path, values: dict[str, Any]) -> None:
    """Writes it; its presence says that the sweep is finished."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    atomic.write_file(folder / LEADERBOARD_NAME, text + "\n")


def read_leaderboard(folder: Path) -> dict[str, Any] | None:
    """The leaderboard of a finished sweep, None where there is none.

    The folders of its configurations are those inside `folder`, which may have been moved.

    Raises:
        InputError: it is damaged.
    """
    path = folder / LEADERBOARD_NAME
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for row in values["configurations"]:
            row["folder"] = str(folder / row["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: remove it, and add --resume to make it anew") from (
            error
        )
    return values
