"""How sure a mean over held-out rows is, and a difference of two of them: percentile bootstrap.

Rows with the same prompt are drawn together, as they are not independent. Differences are paired:
both configurations are looked at on the same draws, so that what makes a row hard for both of them
cancels (Efron and Tibshirani 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

RowLosses = list[tuple[float, int]]
"""Of each row: its summed nats, and its supervised tokens (or another unit of an objective)."""

DRAWS = 2000
LEVEL = 0.95  # the share of draws within an interval


@dataclass(frozen=True)
class Interval:
    """A value and the ends within which 95% of the draws are."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of its width."""
        return (self.high - self.low) / 2

    @property
    def holds_zero(self) -> bool:
        """Whether nothing says that the value is not zero."""
        return self.low <= 0 <= self.high


def mean_loss(*parts: RowLosses) -> float:
    """Nats per supervised token of all rows."""
    rows = [row for part in parts for row in part]
    return sum(nats for nats, _ in rows) / sum(tokens for _, tokens in rows)


def loss_interval(
    rows: RowLosses, units: Sequence[int], seed: int, minus: RowLosses | None = None
) -> Interval:
    """The mean loss of `rows`, and its interval.

    Args:
        units: the number of each row's prompt.
        minus: other losses of the same rows, whose mean is taken off.
    """
    draws = _draws(max(units) + 1, seed)

    def means(rows: RowLosses) -> torch.Tensor:
        sums = torch.zeros(draws.shape[1], 2, dtype=torch.float64)
        sums.index_add_(0, torch.tensor(units), torch.tensor(rows, dtype=torch.float64))
        nats, tokens = sums[draws].sum(1).unbind(1)
        return nats / tokens

    if minus is None:
        return _interval(mean_loss(rows), means(rows))
    return _interval(mean_loss(rows) - mean_loss(minus), means(rows) - means(minus))


def mean_interval(
    groups: Sequence[tuple[float, int]],
    seed: int = 0,
    minus: Sequence[tuple[float, int]] | None = None,
) -> Interval:
    """The mean of values, and its interval over draws of the groups that they belong to.

    Args:
        groups: the sum of each group's values, and their number.
        minus: of the same groups, whose mean is taken off.
    """
    units = range(len(groups))
    return loss_interval([*groups], units, seed, None if minus is None else [*minus])


def sums_interval(
    score: Callable[[Mapping[str, torch.Tensor]], float],
    rows: Mapping[str, torch.Tensor],
    units: Sequence[int],
    seed: int,
    minus: Mapping[str, torch.Tensor] | None = None,
) -> Interval:
    """The value of `score` of the sums over rows, and its interval.

    Args:
        rows: by name the values of the rows (rows, …), float64.
        units, minus: as in `loss_interval`.
    """
    count = max(units) + 1
    draws = _draws(count, seed)
    # How often each draw has each unit, as a matrix: the sums of all draws are one product.
    often = torch.zeros(len(draws), count, dtype=torch.float64)
    often.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))

    def values(rows: Mapping[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
        drawn = {}
        for name, of_rows in rows.items():
            of_units = torch.zeros(count, *of_rows.shape[1:], dtype=torch.float64)
            of_units.index_add_(0, torch.tensor(units), of_rows)
            drawn[name] = torch.tensordot(often, of_units, dims=1)
        whole = score({name: of_rows.sum(0) for name, of_rows in rows.items()})
        each = [score({k: sums[i] for k, sums in drawn.items()}) for i in range(len(draws))]
        return whole, torch.tensor(each, dtype=torch.float64)

    mean, found = values(rows)
    if minus is None:
        return _interval(mean, found)
    other_mean, other = values(minus)
    return _interval(mean - other_mean, found - other)


def score_interval(score: Callable[[list[int]], float], units: int, seed: int) -> Interval:
    """The value of `score` over all of so many units, and its interval over draws of them.

    Args:
        score: of the units whose numbers it is given, some of them more than once.
    """
    draws = _draws(units, seed, count=200)  # a corpus is scored anew for each
    values = torch.tensor([score(draw) for draw in draws.tolist()], dtype=torch.float64)
    return _interval(score(list(range(units))), values)


def _draws(units: int, seed: int, count: int = DRAWS) -> torch.Tensor:
    """`count` draws of so many units, with repetition: (count, units)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(units, (count, units), generator=generator)


def _interval(mean: float, values: torch.Tensor) -> Interval:
    outside = (1 - LEVEL) / 2
    ends = torch.quantile(values, torch.tensor([outside, 1 - outside], dtype=torch.float64))
    return Interval(mean, float(ends[0]), float(ends[1]))
