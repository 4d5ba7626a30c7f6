"""Which configuration wins, and which are no different: a sweep's table, in `leaderboard.json`.

Configurations are chosen by the selection rows and reported on the report rows. One that was
stopped is compared with the winner at the same share of their runs: by the same score, or by the
loss where the winner is chosen by answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lorakit import atomic
from lorakit.bootstrap import Interval
from lorakit.errors import InputError
from lorakit.sweeps.criterion import Criterion
from lorakit.sweeps.ranks import RankChoice
from lorakit.sweeps.records import Record
from lorakit.sweeps.space.sweep_settings import SweepSettings
from lorakit.sweeps.splits import REPORT, SELECTION
from lorakit.sweeps.sweep_folder import LEADERBOARD_NAME
from lorakit.version import __version__

Status = Literal["winner", "finished", "stopped", "diverged"]


@dataclass(frozen=True)
class Standing:
    """A configuration among the others.

    Attributes:
        share: of its run, where its values were taken; None where it diverged.
        selection, report: the criterion's value on these rows; of one that was stopped the loss,
            where the criterion is of answers.
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
    def alike(self) -> bool:
        """Whether nothing tells it from the winner."""
        return self.behind is not None and self.behind.holds_zero

    def to_dict(self) -> dict[str, Any]:
        """One record of the leaderboard, as plain JSON types."""
        record = self.record
        return {
            "name": record.name,
            "status": self.status,
            "changes": record.changes,
            "folder": record.configuration.recipe.output_dir,
            "share": self.share,
            "step": record.step,
            "planned_steps": record.planned,
            "seconds": round(record.seconds, 2),
            "selection": self.selection and asdict(self.selection),
            "report": self.report and asdict(self.report),
            "behind": self.behind and asdict(self.behind),
            "no_difference": self.alike,
            "diverged": record.diverged,
            "rungs": [
                {"share": rung.share, "step": rung.step, **rung.means} for rung in record.rungs
            ],
        }


def standings(records: Sequence[Record], criterion: Criterion) -> list[Standing]:
    """All configurations, the best first; those that were stopped after those that were not."""
    healthy = [record for record in records if record.diverged is None]
    chosen = {r.name: criterion.interval(r, SELECTION) for r in healthy if r.finished}
    finished = [r for r in healthy if r.finished]
    finished.sort(key=lambda r: criterion.sign * chosen[r.name].mean)
    winner = finished[0]
    found = [
        Standing(
            record,
            "finished" if i else "winner",
            1.0,
            chosen[record.name],
            criterion.interval(record, REPORT),
            criterion.interval(record, REPORT, minus=winner) if i else None,
        )
        for i, record in enumerate(finished)
    ]
    stopped = [r for r in healthy if not r.finished]
    stopped.sort(key=lambda r: (-r.last.share, criterion.cost(r.last)))
    found += [_stopped(record, winner, criterion) for record in stopped]
    return found + [Standing(r, "diverged") for r in records if r.diverged is not None]


def _stopped(record: Record, winner: Record, criterion: Criterion) -> Standing:
    last, other = record.last, winner.at(record.last.share)
    selection, report = (criterion.at_rung(last, split) for split in (SELECTION, REPORT))
    behind = criterion.at_rung(last, REPORT, minus=other) if other else None
    return Standing(record, "stopped", last.share, selection, report, behind)


def verdict(found: Sequence[Standing], criterion: Criterion) -> str:
    """The winner, by how much, and which others may be as good, in one or two sentences."""
    winner, *others = found
    assert winner.report is not None
    rows = criterion.base.splits[REPORT]
    what = _unit(criterion) if criterion.name == "loss" else criterion.name
    text = (
        f"{winner.record.name} wins: {winner.report.mean:.4g} {what} "
        f"[{winner.report.low:.4g}, {winner.report.high:.4g}] on {len(rows.rows)} rows that "
        "choosing did not see."
    )
    if alike := [other for other in others if other.alike]:
        names = ", ".join(_difference_to(other) for other in alike[:4])
        more = f" and {len(alike) - 4} more" if len(alike) > 4 else ""
        return f"{text} No difference was found to {names}{more}."
    return f"{text} All others are worse by more than chance." if others else text


def _unit(criterion: Criterion) -> str:
    """What the loss is measured in."""
    unit = criterion.base.inputs.objective.unit
    return "nats a token" if unit == "supervised token" else f"per {unit}"


def _difference_to(other: Standing) -> str:
    assert other.behind is not None
    early = f" at {other.share:.0%} of the run" if other.status == "stopped" else ""
    return f"{other.record.name} ({other.behind.low:+.3g} to {other.behind.high:+.3g}{early})"


def leaderboard(
    found: Sequence[Standing],
    criterion: Criterion,
    settings: SweepSettings,
    ranks: RankChoice | None,
    notices: Sequence[str],
) -> dict[str, Any]:
    """Everything that is known of a finished sweep."""
    base = criterion.base
    planned, done = (sum(getattr(s.record, key) for s in found) for key in ("planned", "step"))
    return {
        "lorakit": __version__,
        "model": base.recipe.model,
        "sweep": settings.model_dump(mode="json"),
        "objective": criterion.name,
        "loss_unit": _unit(criterion),
        "verdict": verdict(found, criterion),
        "winner": found[0].record.name,
        "rows": {
            "train": len(base.inputs.data.train),
            **{name: len(part.rows) for name, part in base.splits.items()},
        },
        "prompts": {name: part.prompts for name, part in base.splits.items()},
        "base": {name: asdict(base.interval(base.bare_losses, name)) for name in base.splits},
        "steps": {"planned": planned, "done": done, "saved": 1 - done / planned},
        "seconds": round(sum(s.record.seconds for s in found), 2),
        "ranks": ranks and {**asdict(ranks), "line": ranks.line},
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
