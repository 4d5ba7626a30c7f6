"""Successive halving: who goes on at each rung, decided by held-out losses alone.

At a rung one in `reduction_factor` goes on to train that many times longer (Jamieson and Talwalkar
2016, arXiv:1502.07943). Where configurations come in rounds, a later one goes on by the rule of
ASHA (Li et al. 2020, arXiv:1810.05934): when it is within the best share of all that reached the
rung so far. All of a round are waited for, so that the same losses give the same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


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
