"""A reward adapter (objective reward) as a reward: on a base model of its own, loaded when needed.

A run scores completions on the base that it trains on instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakit.adapters.manifest import read_manifest
from lorakit.adapters.open import open_adapter
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.evaluation.held_out import rows_of
from lorakit.evaluation.reward_evaluation import scored_rows
from lorakit.models.load import most_tokens
from lorakit.objectives.registry import make_objective
from lorakit.objectives.reward import Reward
from lorakit.rewards.reward_table import RewardInput

_TOKENS = 1024  # of a conversation, where the record does not say


def reward_objective(folder: str | Path) -> tuple[Reward, int]:
    """What the adapter in `folder` has learned by, and how many tokens it reads.

    Raises:
        InputError: it is no adapter of objective reward that lorakit trained.
    """
    manifest = read_manifest(folder)
    recorded = manifest.recipe.get("objective") if manifest else None
    objective = make_objective(recorded) if recorded else None
    if manifest is None or not isinstance(objective, Reward):
        raise InputError(
            f"rewards: {folder} is no reward adapter: give the folder of a run with objective: "
            "reward"
        )
    return objective, int(manifest.recipe["data"].get("max_length", _TOKENS))


def reward_scorer(
    folder: str | Path, **options: Any
) -> Callable[[Sequence[RewardInput]], list[float]]:
    """What scores completions by the adapter.

    Args:
        options: of `open_adapter`.

    Raises:
        InputError: it is no reward adapter.
    """
    objective, length = reward_objective(folder)
    opened = None

    def scores(asked: Sequence[RewardInput]) -> list[float]:
        nonlocal opened
        opened = opened or open_adapter(folder, **options)
        samples = [Sample(tuple(one.conversation), None, one.where) for one in asked]
        rows = rows_of(objective, opened.tokenizer, samples, most_tokens(opened.model, length))
        found, _ = scored_rows(opened, objective, rows, batch_size=16, pairs=False)
        return [one.scores[0] for one in found]

    return scores
