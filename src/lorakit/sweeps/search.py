"""The course of a sweep: rounds of draws, the rungs that each round climbs, and who goes on.

What it decides follows from the records of configurations, so that it may be stopped anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorakit.progress import task
from lorakit.sweeps.choosing.bootstrap import mean_loss
from lorakit.sweeps.choosing.halving import promoted
from lorakit.sweeps.ground import SELECTION
from lorakit.sweeps.records import Record, mean_at, read_record
from lorakit.sweeps.runner import Configuration, Runner
from lorakit.sweeps.space.samplers import Changes, Outcome, Sampler

Make = Callable[[Sequence[Changes], Sequence[Configuration]], list[Configuration]]
"""Makes configurations of draws, beside those that there are."""


@dataclass(frozen=True)
class Search:
    """Trains what a sampler draws.

    Args:
        make: draws as configurations.
        shares: the rungs, as shares of a whole run; the last one is 1.
        reduction_factor: one in so many goes on behind each rung.
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
        """Trains `entrants` from the rung `start` on; at each rung, those go on that may."""
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
        """The best of those that were stopped goes on where all that went on have diverged."""
        while not any(record.finished for record in records):
            left = [record for record in records if record.diverged is None]
            if not left:
                return
            furthest = max(record.last.share for record in left)
            losses = mean_at(left, furthest, SELECTION)
            best = min(losses, key=lambda name: losses[name])
            self.say(f"{best} goes on instead of those that were dropped")
            [record] = [r for r in left if r.configuration.name == best]
            rung = next(i for i, share in enumerate(self.shares) if share == furthest)
            self._climb([record], [record], rung + 1)
