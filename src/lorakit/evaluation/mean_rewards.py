"""Mean rewards of models on the same prompts, with intervals, and the difference of two of them.

Each model writes completions of each prompt; intervals are those of a bootstrap over prompts, and
those of the difference are paired: the same prompts are drawn for both models.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit.bootstrap import Interval, mean_interval
from lorakit.progress import task
from lorakit.rewards.reward_table import RewardInput
from lorakit.rewards.rewards import Rewards

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MeanReward:
    """One function: its mean by model, and the last model's minus the first one's.

    Attributes:
        name: the function's, or `reward` for the weighted sum of several.
        means: None where a model got no reward from it at all.
        difference: over the prompts for which both models got one.
    """

    name: str
    means: Mapping[str, Interval | None]
    difference: Interval | None


@dataclass(frozen=True)
class RewardComparison:
    """Rewards of models on the same prompts.

    Attributes:
        models: their names, two of them; the difference is the second one's minus the first one's.
        prompts: how many.
        rewards: of each function.
        notices: why completions have no reward.
        completions: of each model, with their rewards.
    """

    models: tuple[str, str]
    prompts: int
    rewards: Sequence[MeanReward]
    notices: Sequence[str]
    completions: Sequence[dict[str, Any]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def compare_rewards(
    rewards: Rewards, written: Mapping[str, Sequence[RewardInput]], size: int, began: float
) -> RewardComparison:
    """The rewards of two models' completions.

    Args:
        written: by the model's name its completions, those of one prompt in a row.
        size: completions of each prompt.
        began: when the evaluation did (`time.perf_counter`).

    Raises:
        InputError: the rows lack a column that a function needs.
    """
    rewards.stops = False
    first, second = written
    tables = {}
    with task("rewards"):
        for model, asked in written.items():
            tables[model] = rewards(asked)
    names = [*rewards.names, *(["reward"] if len(rewards.names) > 1 else [])]
    columns = {
        model: [*table.values.unbind(1), table.totals][: len(names)]
        for model, table in tables.items()
    }
    means = []
    for i, name in enumerate(names):
        sums = {model: _by_prompt(own[i], size) for model, own in columns.items()}
        both = [(a, b) for a, b in zip(sums[first], sums[second], strict=True) if a[1] and b[1]]
        means.append(
            MeanReward(
                name,
                {model: _interval(own) for model, own in sums.items()},
                mean_interval([b for _, b in both], minus=[a for a, _ in both]) if both else None,
            )
        )
    return RewardComparison(
        (first, second),
        len(written[first]) // size,
        means,
        [f"{model}: {one.line}" for model, table in tables.items() for one in table.problems],
        [
            {
                "model": model,
                "where": one.where,
                "completion": one.completion,
                "rewards": dict(zip(table.names, _plain(row), strict=True)),
            }
            for model, table in tables.items()
            for one, row in zip(written[model], table.values, strict=True)
        ],
        round(time.perf_counter() - began, 2),
    )


def _by_prompt(values: torch.Tensor, size: int) -> list[tuple[float, int]]:
    """The sum and the number of each prompt's rewards, without those that are NaN."""
    groups = values.view(-1, size)
    counts = (~groups.isnan()).sum(1).tolist()
    return list(zip(groups.nansum(1).tolist(), counts, strict=True))


def _interval(sums: Sequence[tuple[float, int]]) -> Interval | None:
    given = [one for one in sums if one[1]]
    return mean_interval(given) if given else None


def _plain(row: torch.Tensor) -> list[float | None]:
    return [None if value != value else value for value in row.tolist()]
