"""What a run keeps of the completions that it samples, for `completions.jsonl` and the report.

Of each group all rewards and lengths, and the text of its first completion, which is as good as one
drawn at random; of held-out prompts the rewards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.data.samples import Sample
    from lorakit.objectives.rollout import Rollout

_MOST_TEXTS = 8
"""Groups of a step whose texts are kept."""
_LONGEST, _LONGEST_PROMPT = 2000, 500  # characters


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
