"""The course of a sweep: rounds of draws, the rungs that each round climbs, and who is promoted.

At a rung one in `reduction_factor` is promoted to train that many times longer (successive
halving, Jamieson and Talwalkar 2016, arXiv:1502.07943). Where configurations come in rounds, a
later one is promoted by the rule of ASHA (Li et al. 2020, arXiv:1810.05934): when it is within the
best share of all that reached the rung so far. Everything follows from the records of
configurations, so that a sweep may be stopped anywhere and decides the same when it is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lorakit.progress import task
from lorakit.sweeps.base import SELECTION
from lorakit.sweeps.bootstrap import mean_loss
from lorakit.sweeps.records import Progress, Record, mean_at, read_record
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
        make: draws as configurations.
        shares: the rungs, as shares of a whole run; the last one is 1.
        reduction_factor: one in so many is promoted at each rung.
        say: shows a line to the user.
    """

    sampler: Sampler
    make: Make
    runner: Runner
    shares: Sequence[float]
    reduction_factor: int
    say: Callable[[str], None]

    def run(self) -> list[Record]:
        """The records of all configurations, in the order in which they were drawn.

        Raises:
            StoppedError: Ctrl-C or SIGTERM; what was trained is saved.
        """
        records: list[Record] = []
        while draws := self._next_draws(records):
            own = self.make(draws, [record.configuration for record in records])
            entrants = [read_record(configuration) for configuration in own]
            records += entrants
            self._climb(entrants, records)
        self._replace_the_fallen(records)
        return records

    def _next_draws(self, records: Sequence[Record]) -> list[Changes]:
        known = [
            Outcome(dict(r.configuration.changes), mean_loss(r.last.losses[SELECTION]))
            for r in records
            if r.diverged is None
        ]
        return self.sampler.draw([dict(r.configuration.changes) for r in records], known)

    def _climb(self, entrants: Sequence[Record], records: Sequence[Record], start: int = 0) -> None:
        """Trains `entrants` from the rung `start` on; at each rung the best are promoted."""
        for i in range(start, len(self.shares)):
            share = self.shares[i]
            self._train([record for record in entrants if record.at(share) is None], share)
            entrants = [record for record in entrants if record.diverged is None]
            if share == 1 or not entrants:
                return
            losses = mean_at(records, share, SELECTION)
            names = [record.configuration.name for record in entrants]
            chosen = promoted(losses, names, self.reduction_factor)
            best = min(names, key=lambda name: losses[name])
            self.say(
                f"behind {share:.0%} of the steps {len(chosen)} of {len(entrants)} go on; "
                f"the best is {best} with a loss of {losses[best]:.4f}"
            )
            entrants = [r for r in entrants if r.configuration.name in chosen]

    def _train(self, records: Sequence[Record], share: float) -> None:
        waiting = [record for record in records if record.diverged is None]
        if not waiting:
            return
        what = (
            waiting[0].configuration.name if len(waiting) == 1 else f"{len(waiting)} configurations"
        )
        self.say(f"training up to {share:.0%} of the steps: {what}")
        with task(f"training up to {share:.0%}", len(waiting)):
            progress = self.runner.advance([record.configuration for record in waiting], share)
        for record in waiting:
            record.add(share, progress[record.configuration.name])
            if record.diverged is not None:
                self.say(f"{record.configuration.name} is dropped: {record.diverged}")

    def _replace_the_fallen(self, records: Sequence[Record]) -> None:
        """Resumes the best stopped configuration where all that were promoted have diverged."""
        while not any(record.finished for record in records):
            left = [record for record in records if record.diverged is None]
            if not left:
                return
            furthest = max(record.last.share for record in left)
            losses = mean_at(left, furthest, SELECTION)
            best = min(losses, key=lambda name: losses[name])
            self.say(f"{best} continues instead of those that were dropped")
            [record] = [r for r in left if r.configuration.name == best]
            rung = next(i for i, share in enumerate(self.shares) if share == furthest)
            self._climb([record], [record], rung + 1)


def rungs(configurations: int, reduction_factor: int) -> list[float]:
    """The shares of a whole run at which losers are stopped, and 1.0 at the end.

    So many rungs that one or a few are left at the end: 12 configurations and a factor of 3 give
    1/9, 1/3 and 1, which 12, 4 and 1 of them reach.
    """
    count, left = 0, configurations
    while left >= reduction_factor:
        left //= reduction_factor
        count += 1
    return [reduction_factor**-k for k in range(count, -1, -1)]


def promoted(
    losses: Mapping[str, float], candidates: Sequence[str], reduction_factor: int
) -> list[str]:
    """Those of `candidates` that go on, in their order.

    Args:
        losses: at this rung, of all that ever reached it and did not diverge, by name.
        candidates: those of this round that are in `losses`.
    """
    ranked = sorted(losses, key=lambda name: losses[name])  # stable: the earlier one wins a tie
    best = set(ranked[: max(1, round(len(ranked) / reduction_factor))])
    return [name for name in candidates if name in best]
