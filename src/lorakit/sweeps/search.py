"""The course of a sweep: rounds of draws, the rungs that each round climbs, and who is promoted.

At a rung one in `reduction_factor` is promoted to train that many times longer (successive
halving, Jamieson and Talwalkar 2016, arXiv:1502.07943). A configuration of a later round is
promoted when it is within the best share of all that reached the rung so far (ASHA, Li et al. 2020,
arXiv:1810.05934). All decisions follow from the records, so that a sweep may be resumed anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lorakit.progress import task
from lorakit.sweeps.records import Progress, Record, Rung, read_record
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.space.samplers import Changes, Outcome, Sampler

Make = Callable[[Sequence[Changes], Sequence[Configuration]], list[Configuration]]
"""Makes configurations of draws, beside those that there are."""


class Runner(Protocol):
    """Trains configurations, each to a share of its own run."""

    def advance(self, configurations: Sequence[Configuration], to: float) -> dict[str, Progress]:
        """Trains each to the share `to` (0 < to <= 1) of its own planned steps.

        Resumes from where its own folder says it is; writes its checkpoint, and at `to == 1` its
        adapter files, there. Both are those of `lorakit train`.
        """


@dataclass(frozen=True)
class Search:
    """Trains what a sampler draws.

    Args:
        shares: the rungs, as shares of a whole run; the last one is 1.
        reduction_factor: one in this many is promoted at each rung.
        cost: what configurations are compared by at a rung; smaller is better.
        shown: a cost in words.
    """

    sampler: Sampler
    make: Make
    runner: Runner
    shares: Sequence[float]
    reduction_factor: int
    say: Callable[[str], None]
    cost: Callable[[Rung], float]
    shown: Callable[[float], str]

    def run(self) -> list[Record]:
        """The records of all configurations, in the order in which they were drawn."""
        records: list[Record] = []
        while draws := self._next_draws(records):
            own = self.make(draws, [record.configuration for record in records])
            entrants = [read_record(configuration) for configuration in own]
            records += entrants
            self._climb(entrants, records)
        self._resume_the_best_stopped(records)
        return records

    def _next_draws(self, records: Sequence[Record]) -> list[Changes]:
        known = [Outcome(r.changes, self.cost(r.last)) for r in records if r.diverged is None]
        return self.sampler.draw([r.changes for r in records], known)

    def _climb(self, entrants: Sequence[Record], records: Sequence[Record], start: int = 0) -> None:
        """Trains `entrants` from the rung `start` on; at each rung the best are promoted."""
        for share in self.shares[start:]:
            self._train([record for record in entrants if record.at(share) is None], share)
            entrants = [record for record in entrants if record.diverged is None]
            if share == 1 or not entrants:
                return
            costs = self._costs(records, share)
            names = [record.name for record in entrants]
            chosen = promoted(costs, names, self.reduction_factor)
            best = min(names, key=costs.__getitem__)
            self.say(
                f"after {share:.0%} of the steps {len(chosen)} of {len(entrants)} continue; "
                f"the best is {best} with {self.shown(costs[best])}"
            )
            entrants = [r for r in entrants if r.name in chosen]

    def _costs(self, records: Sequence[Record], share: float) -> dict[str, float]:
        """By name, the cost of those that reached `share`."""
        return {
            record.name: self.cost(rung)
            for record in records
            if record.diverged is None and (rung := record.at(share)) is not None
        }

    def _train(self, records: Sequence[Record], share: float) -> None:
        waiting = [record for record in records if record.diverged is None]
        if not waiting:
            return
        what = waiting[0].name if len(waiting) == 1 else f"{len(waiting)} configurations"
        self.say(f"training up to {share:.0%} of the steps: {what}")
        with task(f"training up to {share:.0%}", len(waiting)):
            progress = self.runner.advance([record.configuration for record in waiting], share)
        for record in waiting:
            record.add(share, progress[record.name])
            if record.diverged is not None:
                self.say(f"{record.name} is dropped: {record.diverged}")

    def _resume_the_best_stopped(self, records: Sequence[Record]) -> None:
        """Resumes the best stopped configuration where all that were promoted have diverged."""
        while not any(record.finished for record in records):
            left = [record for record in records if record.diverged is None]
            if not left:
                return
            furthest = max(record.last.share for record in left)
            costs = self._costs(left, furthest)
            best = min(costs, key=costs.__getitem__)
            self.say(f"{best} continues instead of those that were dropped")
            entrants = [record for record in left if record.name == best]
            self._climb(entrants, entrants, self.shares.index(furthest) + 1)


def rungs(configurations: int, reduction_factor: int) -> list[float]:
    """The shares of a whole run at which losers are stopped, and 1.0 at the end.

    So many rungs that one or a few are left at the end: 12 configurations and a factor of 3 give
    1/9, 1/3 and 1, which 12, 4 and 1 of them reach.
    """
    shares: list[float] = [1]
    while configurations >= reduction_factor ** len(shares):
        shares.insert(0, reduction_factor ** -len(shares))
    return shares


def promoted(
    costs: Mapping[str, float], candidates: Sequence[str], reduction_factor: int
) -> list[str]:
    """Those of `candidates` that continue, in their order.

    Args:
        costs: at this rung, of all that ever reached it and did not diverge, by name.
        candidates: those of this round that are in `costs`.
    """
    ranked = sorted(costs, key=costs.__getitem__)  # stable: the earlier one wins a tie
    best = set(ranked[: max(1, round(len(ranked) / reduction_factor))])
    return [name for name in candidates if name in best]
