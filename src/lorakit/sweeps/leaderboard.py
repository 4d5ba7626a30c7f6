"""Who won, and from whom the winner cannot be told: the table of a sweep, in `leaderboard.json`.

Configurations are chosen by the selection rows and told by the report rows. One that was stopped
is compared with the winner where both stood at the same share of their runs, by the loss, which is
all that is known of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorakit import atomic
from lorakit.errors import InputError
from lorakit.sweeps.base import REPORT, SELECTION, SplitLosses
from lorakit.sweeps.bootstrap import Interval, loss_interval, mean_loss
from lorakit.sweeps.criterion import Criterion
from lorakit.sweeps.output import LEADERBOARD_NAME
from lorakit.sweeps.ranks import RankChoice
from lorakit.sweeps.records import Record
from lorakit.sweeps.space.settings import SweepSettings
from lorakit.version import __version__

Status = Literal["winner", "finished", "stopped", "diverged"]


@dataclass(frozen=True)
class Standing:
    """A configuration among the others.

    Attributes:
        share: of its run, where its values were taken; None where it diverged.
        selection, report: the criterion's value on these rows; of one that was stopped, the loss.
        behind: its value less the winner's at the same share, on the report rows; None of the
            winner, and of one that diverged.
    """

    record: Record
    status: Status
    share: float | None = None
    selection: Interval | None = None
    report: Interval | None = None
    behind: Interval | None = None

    @property
    def name(self) -> str:
        """The configuration's."""
        return self.record.configuration.name

    @property
    def alike(self) -> bool:
        """Whether nothing tells it from the winner."""
        return self.behind is not None and self.behind.holds_zero

    def to_dict(self) -> dict[str, Any]:
        """One record of the leaderboard, as plain JSON types."""
        record = self.record
        return {
            "name": self.name,
            "status": self.status,
            "changes": dict(record.configuration.changes),
            "folder": record.configuration.recipe.output_dir,
            "share": self.share,
            "step": record.step,
            "planned_steps": record.planned,
            "seconds": round(record.seconds, 2),
            "selection": self.selection and self.selection.to_dict(),
            "report": self.report and self.report.to_dict(),
            "behind": self.behind and self.behind.to_dict(),
            "no_difference": self.alike,
            "diverged": record.diverged,
            "rungs": [
                {
                    "share": rung.share,
                    "step": rung.step,
                    **{split: mean_loss(rows) for split, rows in rung.losses.items()},
                }
                for rung in record.rungs
            ],
        }


def standings(records: Sequence[Record], criterion: Criterion) -> list[Standing]:
    """All configurations, the best first; those that were stopped behind those that were not.

    Args:
        records: of which one at least is finished; what the criterion needs is there.
    """
    finished = [r for r in records if r.finished and r.diverged is None]
    values = {r.configuration.name: criterion.interval(r, SELECTION) for r in finished}
    finished.sort(key=lambda r: criterion.sign * values[r.configuration.name].mean)
    winner = finished[0]
    found = []
    for record in finished:
        first = record is winner
        found.append(
            Standing(
                record,
                "winner" if first else "finished",
                1.0,
                values[record.configuration.name],
                criterion.interval(record, REPORT),
                None if first else criterion.interval(record, REPORT, minus=winner),
            )
        )
    stopped = [r for r in records if not r.finished and r.diverged is None]
    stopped.sort(key=lambda r: (-r.last.share, mean_loss(r.last.losses[SELECTION])))
    found += [_stopped(record, winner, criterion) for record in stopped]
    return found + [Standing(r, "diverged") for r in records if r.diverged is not None]


def _stopped(record: Record, winner: Record, criterion: Criterion) -> Standing:
    splits, seed, last = criterion.base.splits, criterion.seed, record.last
    intervals = {
        name: loss_interval(last.losses[name], part.units, seed) for name, part in splits.items()
    }
    beside = winner.at(last.share)
    behind = None
    if beside is not None:
        units = splits[REPORT].units
        behind = loss_interval(last.losses[REPORT], units, seed, minus=beside.losses[REPORT])
    return Standing(record, "stopped", last.share, intervals[SELECTION], intervals[REPORT], behind)


def verdict(found: Sequence[Standing], criterion: Criterion) -> str:
    """Who won by how much, and who else may be as good, in one or two sentences."""
    winner, *others = found
    assert winner.report is not None
    rows = criterion.base.splits[REPORT]
    what = "nats a token" if criterion.name == "loss" else criterion.name
    text = (
        f"{winner.name} wins: {winner.report.mean:.4g} {what} "
        f"[{winner.report.low:.4g}, {winner.report.high:.4g}] on {len(rows.rows)} rows that "
        "choosing did not see."
    )
    if alike := [other for other in others if other.alike]:
        names = ", ".join(_beside(other) for other in alike[:4])
        more = f" and {len(alike) - 4} more" if len(alike) > 4 else ""
        return f"{text} No difference was found to {names}{more}."
    return f"{text} All others are worse by more than chance." if others else text


def _beside(other: Standing) -> str:
    assert other.behind is not None
    early = f" at {other.share:.0%} of the run" if other.status == "stopped" else ""
    return f"{other.name} ({other.behind.low:+.3g} to {other.behind.high:+.3g}{early})"


def leaderboard(
    found: Sequence[Standing],
    criterion: Criterion,
    settings: SweepSettings,
    base_losses: SplitLosses,
    ranks: RankChoice | None,
    notices: Sequence[str],
) -> dict[str, Any]:
    """Everything that is told of a finished sweep.

    Args:
        base_losses: of the bare base.
        ranks: the winner at smaller ranks.
        notices: lines that were shown as warnings.
    """
    base = criterion.base
    planned, done = (sum(getattr(s.record, key) for s in found) for key in ("planned", "step"))
    return {
        "lorakit": __version__,
        "model": base.recipe.model,
        "sweep": settings.model_dump(mode="json"),
        "objective": criterion.name,
        "verdict": verdict(found, criterion),
        "winner": found[0].name,
        "rows": {
            "train": len(base.begun.data.train),
            **{name: len(part.rows) for name, part in base.splits.items()},
        },
        "prompts": {name: max(part.units) + 1 for name, part in base.splits.items()},
        "base": {
            name: loss_interval(base_losses[name], part.units, criterion.seed).to_dict()
            for name, part in base.splits.items()
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
        raise InputError(f"{path} is damaged: remove it, and add --resume to write it again") from (
            error
        )
    return values
