"""What a run keeps of the completions that it samples, for `completions.jsonl` and the report.

Of each group all rewards and lengths, and the text of its first completion, which is as good as one
drawn at random; of held-out prompts the rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.data.prompt_tokens import PromptRow
    from lorakit.data.samples import Sample
    from lorakit.objectives.rollout import Rollout

Gather = Callable[[list[Any]], tuple[list[Any], int]]

_MOST_TEXTS = 8
"""Groups of a step whose texts are kept."""
_LONGEST, _LONGEST_PROMPT = 2000, 500  # characters


class CompletionLog:
    """What is kept of completions until it is taken.

    Attributes:
        metrics: what reward functions have logged, by name.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._groups: list[dict[str, Any]] = []
        self._held_out: dict[int, dict[str, Any]] = {}

    def add(
        self,
        prompt: PromptRow,
        rollouts: Sequence[Rollout],
        values: Sequence[Sequence[float]],
        rewards: Sequence[float],
        extra: Mapping[str, Any],
    ) -> None:
        """Takes in a group to learn from; arguments as of `group_record`."""
        assert prompt.sample is not None
        number = len(self._groups)
        self._groups.append(group_record(prompt.sample, rollouts, values, rewards, number, extra))

    def add_held_out(self, prompt: PromptRow, values: Sequence[float], reward: float) -> None:
        """Takes in the completion of a held-out prompt."""
        assert prompt.sample is not None
        row = {"where": prompt.sample.where, "values": held_out_record(values, reward)}
        self._held_out[prompt.number] = row

    def taken(self, names: Sequence[str], gather: Gather) -> dict[str, Any]:
        """`Objective.taken_completions`, of rewards of these names."""
        groups, _ = gather(self._groups)
        found = {"rewards": [*names], "groups": groups, "metrics": self.metrics}
        self._groups, self.metrics = [], {}
        return found if groups else {}

    def taken_held_out(self, names: Sequence[str], gather: Gather) -> dict[str, Any]:
        """`Objective.taken_held_out`, of rewards of these names."""
        rows, _ = gather([*self._held_out.items()])
        self._held_out = {}
        in_order = [row for _, row in sorted(dict(rows).items())]
        return {"rewards": [*names], "rows": in_order} if in_order else {}


def group_record(
    sample: Sample,
    rollouts: Sequence[Rollout],
    values: Sequence[Sequence[float]],
    rewards: Sequence[float],
    number: int,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """A group as plain JSON types.

    Args:
        values: of each completion the reward of each function, NaN where it gave none.
        rewards: of each completion the weighted sum.
        number: of the group in its step; the texts of the first ones are kept.
        extra: what functions logged for the first completion.
    """
    record: dict[str, Any] = {
        "where": sample.where,
        "values": [[_plain(value) for value in row] for row in values],
        "reward": [_plain(value) for value in rewards],
        "tokens": [len(one.tokens) for one in rollouts],
        "cut_off": sum(one.finish_reason == "length" for one in rollouts),
    }
    if number < _MOST_TEXTS:
        asked = [one for one in sample.prompt if one["role"] == "user"]
        record["prompt"] = _end(_text(asked[-1]["content"]) if asked else "", _LONGEST_PROMPT)
        record["completion"] = _begin(rollouts[0].text, _LONGEST)
    if extra:
        record["extra"] = {name: _short(value) for name, value in extra.items()}
    return record


def held_out_record(values: Sequence[float], reward: float) -> list[float | None]:
    """The rewards of a held-out prompt's completion: of each function, and the weighted sum."""
    return [_plain(value) for value in (*values, reward)]


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else str(content)


def _short(value: Any) -> Any:
    return value if isinstance(value, (int, float, bool)) or value is None else str(value)[:200]


def _begin(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[-most:]}"
