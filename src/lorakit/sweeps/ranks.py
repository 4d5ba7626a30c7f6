"""How small the winner may become: truncated to smaller ranks and looked at again.

The smallest rank that keeps nearly all of the gain is chosen on the selection rows, and what it
keeps is reported on the others.
"""

from __future__ import annotations

import shutil
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lorakit.adapters.resize import resize
from lorakit.bootstrap import Interval, mean_loss
from lorakit.errors import InputError
from lorakit.sweeps.records import Record
from lorakit.sweeps.splits import REPORT, SELECTION
from lorakit.sweeps.sweep_base import SweepBase

KEPT = 0.99  # the share of the gain that a smaller rank has to keep
_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class RankResult:
    """The winner at a rank.

    Attributes:
        kept: the share of the gain (the base's loss less the adapter's) that is left, by split.
        report: the loss on the report rows.
        difference: `report` less that of the whole winner.
    """

    r: int
    kept: dict[str, float]
    report: float
    difference: Interval


@dataclass(frozen=True)
class RankChoice:
    """The winner's own rank, the smaller ones that were tried, and the smallest that is enough.

    `chosen` is None where none is; else the next smaller one was tried and is not.
    """

    trained: int
    results: list[RankResult]
    chosen: RankResult | None

    @property
    def line(self) -> str:
        """`r=16 trained, r=6 keeps 99.2% of the gain`."""
        if self.chosen is None:
            return f"r={self.trained} trained, and no smaller rank keeps {KEPT:.0%} of the gain"
        kept = self.chosen.kept[REPORT]
        return f"r={self.trained} trained, r={self.chosen.r} keeps {kept:.1%} of the gain"


def rank_choice(winner: Record, base: SweepBase, say: Callable[[str], None]) -> RankChoice | None:
    """Truncates the winner by SVD to smaller ranks and evaluates each.

    The chosen one is kept beside the winner's folder, as `<winner>-as-r6`. There is none where the
    winner has gained nothing, or cannot be truncated.
    """
    recipe, last = winner.configuration.recipe, winner.last
    folder = Path(recipe.output_dir)
    bare = {split: mean_loss(rows) for split, rows in base.bare_losses.items()}
    gains = {split: bare[split] - mean for split, mean in last.means.items()}
    if min(gains.values()) <= 0:
        say("smaller ranks are not looked at: the winner gains nothing over the base")
        return None
    config = recipe.lora_config()
    trained = max([config.r, *config.rank_pattern.values()])
    results: dict[int, RankResult] = {}

    def enough(r: int, place: str) -> bool:
        """Whether the rank does, by the rows that choosing may see."""
        small = Path(place) / f"r{r}"
        resize(folder, small, rank=r)
        with base.with_adapter(small, recipe) as model:
            found = base.held_out.of(model).losses
        kept = {n: (bare[n] - mean_loss(found[n])) / gains[n] for n in gains}
        difference = base.interval(found, REPORT, minus=last.losses)
        results[r] = RankResult(r, kept, mean_loss(found[REPORT]), difference)
        say(f"r={r}: keeps {kept[REPORT]:.1%} of the gain")
        return kept[SELECTION] >= KEPT

    ranks = [r for r in _RANKS if r < trained]
    try:
        with TemporaryDirectory(dir=folder.parent, prefix=".ranks-", suffix=".tmp") as place:
            # The smaller the rank, the more is cut off, so that halving finds the smallest.
            smallest = bisect_left(ranks, True, key=lambda r: enough(r, place))
    except InputError as error:
        say(f"smaller ranks are not looked at: {error}")
        return None
    chosen = results[ranks[smallest]] if smallest < len(ranks) else None
    if chosen:
        kept_as = folder.with_name(f"{folder.name}-as-r{chosen.r}")
        shutil.rmtree(kept_as, ignore_errors=True)  # of a sweep that was killed here
        resize(folder, kept_as, rank=chosen.r)
    return RankChoice(trained, [results[r] for r in sorted(results)], chosen)
