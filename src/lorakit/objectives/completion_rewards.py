"""What rewards are asked of completions, and an environment's own reward beside theirs.

The environment's is one more column of the table, with the weight 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lorakit.data.prompt_tokens import PromptRow
from lorakit.objectives.rollout import Rollout
from lorakit.rewards.inputs_of_rows import reward_input
from lorakit.rewards.reward_table import RewardInput, RewardProblem, RewardTable


def judged(prompt: PromptRow, rollout: Rollout) -> RewardInput:
    """A completion as rewards see it."""
    assert prompt.sample is not None
    return reward_input(
        prompt.sample, rollout.text, rollout.tokens, rollout.messages, rollout.finish_reason
    )


def no_functions(completions: int) -> RewardTable:
    """The rewards of so many completions where there are no reward functions."""
    import torch

    return RewardTable((), (), torch.empty(completions, 0, dtype=torch.float64))


def with_environment(
    table: RewardTable, name: str, rollouts: Sequence[Rollout], asked: Sequence[RewardInput]
) -> RewardTable:
    """The table with the environment's rewards as the last column.

    Args:
        name: the environment's.
        rollouts, asked: of the table's completions. One whose environment failed has no reward of
            it, as where it gives None.
    """
    import torch

    own = [math.nan if one.reward is None else one.reward for one in rollouts]
    causes = Counter(one.failure for one in rollouts if one.failure)
    problems = [
        RewardProblem(name, _first(cause, rollouts, asked), cause, times)
        for cause, times in causes.items()
    ]
    return replace(
        table,
        names=(*table.names, name),
        weights=(*table.weights, 1.0),
        values=torch.cat([table.values, torch.tensor(own, dtype=torch.float64)[:, None]], 1),
        problems=(*table.problems, *problems),
    )


def _first(cause: str, rollouts: Sequence[Rollout], asked: Sequence[RewardInput]) -> str:
    """The row of the first rollout that failed so."""
    pairs = zip(rollouts, asked, strict=True)
    return next(one.where for rollout, one in pairs if rollout.failure == cause)
