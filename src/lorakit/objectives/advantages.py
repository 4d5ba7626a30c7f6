"""How much better a completion is than was to be expected: advantages from rewards.

An estimator is a baseline that is taken off the rewards, and what they are then scaled by. All
prompts have equally many completions, one group after the other. None (NaN) rewards are left out
as in TRL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Scale = Literal["group", "batch", "none"]

_SMALLEST = 1e-4
"""Added to a standard deviation before it divides (TRL's)."""


@dataclass(frozen=True)
class Estimator:
    """An estimator of advantages.

    Attributes:
        baseline: what is taken off rewards (groups, G), of the same shape or broadcast.
        scale: `scale_rewards` where the recipe does not say.
        scales_advantages: the standard deviation is that of the advantages, not of the rewards.
        least: completions that a prompt needs.
    """

    baseline: Callable[[torch.Tensor], torch.Tensor]
    scale: Scale
    scales_advantages: bool = False
    least: int = 2


def group_mean(rewards: torch.Tensor) -> torch.Tensor:
    """The mean of each group (groups, 1) (GRPO, Shao et al. 2024, arXiv:2402.03300)."""
    return rewards.nanmean(1, keepdim=True)


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """The mean of the others of the group (groups, G) (RLOO, Ahmadian 2024, arXiv:2402.14740)."""
    others = (~rewards.isnan()).sum(1, keepdim=True) - 1
    return (rewards.nansum(1, keepdim=True) - rewards) / others


def batch_mean(rewards: torch.Tensor) -> torch.Tensor:
    """The mean of all (REINFORCE++, Hu 2025, arXiv:2501.03262)."""
    return rewards.nanmean()


ESTIMATORS = {
    "grpo": Estimator(group_mean, "group"),
    "rloo": Estimator(leave_one_out, "none"),
    "reinforce_plus_plus": Estimator(batch_mean, "batch", scales_advantages=True, least=1),
    "reinforce_plus_plus_baseline": Estimator(group_mean, "batch", scales_advantages=True),
}
"""By verl's names."""


@dataclass(frozen=True)
class Advantages:
    """What N completions are worth.

    Attributes:
        values: (N,) float64; 0 for those without a reward.
        rewards: (N,) their rewards, weighted and summed; NaN where no function gave one.
        signal: (groups,) whether the rewards of a group differ.
    """

    values: torch.Tensor
    rewards: torch.Tensor
    signal: torch.Tensor


def advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    size: int,
    estimator: str = "grpo",
    scale: Scale | None = None,
    aggregation: str = "sum_then_normalize",
) -> Advantages:
    """Advantages of all completions of a step.

    Args:
        rewards: (N, F) of F functions, NaN where one gave None.
        weights: (F,) of the functions.
        size: completions of a prompt.
        estimator: one of `ESTIMATORS`.
        scale: by the standard deviation of the group or of all; None for the estimator's own.
        aggregation: `normalize_then_sum` normalises the rewards of each function by itself, then
            their weighted sum over all (GDPO, arXiv:2601.05242).
    """
    import torch

    chosen = ESTIMATORS[estimator]
    none = rewards.isnan().all(1)
    totals = (rewards * weights).nansum(1).masked_fill(none, torch.nan)
    grouped = totals.view(-1, size)
    spread = nanstd(grouped, 1) if size > 1 else torch.zeros(len(grouped), 1, dtype=totals.dtype)
    differ = ~torch.isclose(spread, torch.zeros_like(spread)) & ~spread.isnan()
    signal = differ.squeeze(1)
    if aggregation == "normalize_then_sum":
        each = rewards.view(-1, size, rewards.shape[1])
        deviations = nanstd(each, 1)
        normal = (each - each.nanmean(1, keepdim=True)) / (deviations + _SMALLEST)
        summed = (normal.view_as(rewards) * weights).nansum(1).masked_fill(none, torch.nan)
        found = (summed - summed.nanmean()) / (nanstd(summed) + _SMALLEST)
        return Advantages(found.nan_to_num(nan=0.0), totals, signal)
    found = grouped - chosen.baseline(grouped)
    scale = scale or chosen.scale
    if scale == "group":
        found = found / (spread + _SMALLEST)
    elif scale == "batch":
        of: Any = found if chosen.scales_advantages else grouped
        found = found / (nanstd(of.flatten()) + _SMALLEST)
    return Advantages(found.flatten().nan_to_num(nan=0.0), totals, signal)


def nanstd(values: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The standard deviation without NaN, by n - 1, with its dimension kept; NaN of one value."""
    import torch

    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()
