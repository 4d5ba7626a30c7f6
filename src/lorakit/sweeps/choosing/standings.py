"""Who won, and from whom the winner cannot be told: chosen by selection rows, told by report rows.

A configuration that was stopped is compared with the winner where both stood at the same share of
their runs, by the loss, which is all that is known of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.sweeps.choosing.bootstrap import (
    Interval,
    loss_difference,
    loss_interval,
    mean_loss,
)
from lorakit.sweeps.choosing.objective import Objective
from lorakit.sweeps.ground import REPORT, SELECTION
from lorakit.sweeps.records import Record

Status = Literal["winner", "finished", "stopped", "diverged"]


@dataclass(frozen=True)
class Standing:
    """A configuration among the others.

    Attributes:
        share: of its run, where its values were taken; None where it diverged.
        selection, report: the objective's value on these rows; of one that was stopped, the loss.
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


def standings(records: Sequence[Record], objective: Objective) -> list[Standing]:
    """All configurations, the best first; those that were stopped behind those that were not.

    Args:
        records: of which one at least is finished; what the objective needs is there.
    """
    finished = [r for r in records if r.finished and r.diverged is None]
    values = {r.configuration.name: objective.interval(r, SELECTION) for r in finished}
    finished.sort(key=lambda r: objective.sign * values[r.configuration.name].mean)
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
                objective.interval(record, REPORT),
                None if first else objective.difference(record, winner, REPORT),
            )
        )
    stopped = [r for r in records if not r.finished and r.diverged is None]
    stopped.sort(key=lambda r: (-r.last.share, mean_loss(r.last.losses[SELECTION])))
    found += [_stopped(record, winner, objective) for record in stopped]
    return found + [Standing(r, "diverged") for r in records if r.diverged is not None]


def _stopped(record: Record, winner: Record, objective: Objective) -> Standing:
    splits, seed, last = objective.ground.splits, objective.seed, record.last
    intervals = {
        name: loss_interval(last.losses[name], part.units, seed) for name, part in splits.items()
    }
    beside = winner.at(last.share)
    behind = None
    if beside is not None:
        units = splits[REPORT].units
        behind = loss_difference(last.losses[REPORT], beside.losses[REPORT], units, seed)
    return Standing(record, "stopped", last.share, intervals[SELECTION], intervals[REPORT], behind)


def verdict(found: Sequence[Standing], objective: Objective) -> str:
    """Who won by how much, and who else may be as good, in one or two sentences."""
    winner, *others = found
    assert winner.report is not None
    rows = objective.ground.splits[REPORT]
    what = "nats a token" if objective.name == "loss" else objective.name
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
