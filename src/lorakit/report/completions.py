"""What a run kept of the completions that it sampled: `completions.jsonl` and held-out rewards.

Lines that are damaged are left out and counted, as in the other files of a run (`read.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lorakit.adapters.manifest import COMPLETIONS_NAME, HELD_OUT_REWARDS_NAME
from lorakit.bootstrap import Interval, mean_interval

_MOST_POINTS = 60
"""Points of a curve with an interval; steps between them are taken together."""


class CompletionGroup(BaseModel):
    """The completions of one prompt at a step.

    Attributes:
        where, prompt: the row, and the end of its prompt.
        completion: the first of the completions, cut.
        values: of each completion the reward of each function, None where it gave none.
        reward: of each completion the weighted sum.
        tokens: of each completion.
        cut_off: how many of them ended at the limit of tokens.
    """

    where: str = ""
    prompt: str = ""
    completion: str | None = None
    values: list[list[float | None]]
    reward: list[float | None]
    tokens: list[int] = []
    cut_off: int = 0


class StepCompletions(BaseModel):
    """A line of `completions.jsonl`: the groups of a step, and the names of the functions."""

    step: int
    rewards: list[str]
    groups: list[CompletionGroup]


class HeldOutRewards(BaseModel):
    """Rewards of held-out prompts: of each row, by the model's state, the value of each function.

    Attributes:
        rewards: the names of the functions; the last value of a row is the weighted sum.
        where: the rows.
        states: `base`, `start` and `tuned`, those that were measured.
    """

    rewards: list[str]
    where: list[str]
    states: dict[str, list[list[float | None]]]

    def interval(self, state: str, column: int, minus: str | None = None) -> Interval | None:
        """The mean of a function's rewards, or the difference of two states; None without any.

        Args:
            column: the function; -1 is the weighted sum.
        """
        rows = self.states.get(state, [])
        others = self.states.get(minus, []) if minus else rows
        pairs = [
            (a[column], b[column])
            for a, b in zip(rows, others, strict=False)
            if a[column] is not None and b[column] is not None
        ]
        if not pairs:
            return None
        first = [(float(a), 1) for a, _ in pairs if a is not None]
        second = [(float(b), 1) for _, b in pairs if b is not None]
        return mean_interval(first, minus=second if minus else None)


def read_completions(folder: Path, notices: list[str]) -> list[StepCompletions]:
    """The lines of the file; none where there is none."""
    path = folder / COMPLETIONS_NAME
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notices.append(f"{path.name} cannot be read ({error.strerror}).")
        return []
    lines = [line for line in text.split("\n") if line.strip()]
    found = []
    for line in lines:
        with suppress(ValidationError, ValueError, RecursionError):
            found.append(StepCompletions.model_validate(json.loads(line)))
    if damaged := len(lines) - len(found):
        notices.append(f"{path.name}: {damaged} of {len(lines)} lines are damaged and left out.")
    return sorted(found, key=lambda one: one.step)


def read_held_out(folder: Path, notices: list[str]) -> HeldOutRewards | None:
    """The held-out rewards; None where there are none."""
    path = folder / HELD_OUT_REWARDS_NAME
    if not path.is_file():
        return None
    try:
        return HeldOutRewards.model_validate_json(path.read_bytes())
    except (ValidationError, OSError):
        notices.append(f"{path.name} is damaged and left out.")
        return None


def curve(steps: Sequence[StepCompletions], name: str | None) -> list[tuple[float, Interval]]:
    """The mean reward over the steps with its interval, by a bootstrap over groups.

    Args:
        name: of the function; None for the weighted sum.
    """
    size = math.ceil(len(steps) / _MOST_POINTS) or 1
    found = []
    for at in range(0, len(steps), size):
        together = steps[at : at + size]
        groups = [
            own for one in together for group in one.groups if (own := _values(one, group, name))
        ]
        if groups:
            place = sum(one.step for one in together) / len(together)
            found.append((place, mean_interval([(sum(own), len(own)) for own in groups])))
    return found


def _values(step: StepCompletions, group: CompletionGroup, name: str | None) -> list[float]:
    """The rewards of a group by one function, without those that are None."""
    if name is None:
        return [value for value in group.reward if value is not None]
    if name not in step.rewards:
        return []
    at = step.rewards.index(name)
    return [value for row in group.values if at < len(row) and (value := row[at]) is not None]


def early_and_late(steps: Sequence[StepCompletions], number: int) -> list[list[dict[str, Any]]]:
    """Pairs of an early and a late completion, with their rewards.

    Of the same prompt where a prompt was sampled in the first and in the last third of the steps;
    else the first ones beside the last ones.
    """
    third = max(1, len(steps) // 3)
    early = _shown(steps[:third])
    late = _shown(list(reversed(steps[-third:])) if len(steps) > 1 else [])
    by_place: dict[str, dict[str, Any]] = {}
    for one in late:
        by_place.setdefault(one["where"], one)
    pairs, taken = [], set()
    for one in early:
        other = by_place.get(one["where"])
        if other is not None and one["where"] not in taken:
            taken.add(one["where"])
            pairs.append([one, other])
    if not pairs:
        pairs = [[one, other] for one, other in zip(early, late, strict=False)]
    return pairs[:number]


def _shown(steps: Sequence[StepCompletions]) -> list[dict[str, Any]]:
    return [
        {
            "step": one.step,
            "where": group.where,
            "prompt": group.prompt,
            "completion": group.completion,
            "rewards": dict(zip(one.rewards, group.values[0], strict=False)),
            "reward": group.reward[0],
            "tokens": group.tokens[0] if group.tokens else None,
        }
        for one in steps
        for group in one.groups
        if group.completion is not None and group.values and group.reward
    ]
