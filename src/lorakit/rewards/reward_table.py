"""What reward functions are asked (`RewardInput`) and what they gave (`RewardTable`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorakit.errors import count

if TYPE_CHECKING:
    import torch

Text = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


@dataclass(frozen=True)
class RewardInput:
    """One completion of one prompt.

    Attributes:
        prompt: as the user's row has it: a text, or the messages of a conversation.
        completion: of the same kind: a text, or the messages that were written.
        completion_ids: the tokens of the completion.
        columns: of the row, by name; functions get each as a list with a value a completion.
        where: the place of the row, such as `orders.jsonl:12`.
        finish_reason: why the completion ended (`stop`, `length`), where it is known.
        reference: the row's own answer, where it has one.
        messages: the prompt as messages, where `prompt` is a text of one of them.
    """

    prompt: Text
    completion: Text
    completion_ids: Sequence[int] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    finish_reason: str | None = None
    reference: str | None = None
    messages: Sequence[dict[str, Any]] = ()

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The prompt and the completion as messages."""
        prompt, completion = self.prompt, self.completion
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return [*(self.messages or asked), *completion]


@dataclass(frozen=True)
class RewardProblem:
    """Why completions have no reward from a function.

    Attributes:
        name: the function's; empty where no function gave a reward.
        where: the first row with it.
        cause: in words.
        count: of completions.
    """

    name: str
    where: str
    cause: str
    count: int

    @property
    def line(self) -> str:
        """For the user."""
        whose = f"reward {self.name}: " if self.name else ""
        place = f" (the first: {self.where})" if self.where else ""
        lacking = "has" if self.count == 1 else "have"
        number = count(self.count, "completion")
        return f"{whose}{number} {lacking} no reward{place}: {self.cause}"


@dataclass(frozen=True)
class RewardTable:
    """The rewards of N completions by F functions.

    Attributes:
        names: of the functions.
        weights: theirs, in the total.
        values: (N, F) float64; NaN where a function gave None or failed.
        problems: each kind of failure, counted.
        metrics: what functions logged (`log_metric`), the mean of each.
        extra: what functions logged for each completion (`log_extra`), N values each.
        seconds: how long a call of each function took, by name.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    values: torch.Tensor
    problems: tuple[RewardProblem, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, list[Any]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def totals(self) -> torch.Tensor:
        """(N,) the weighted sum without those that are None; NaN where all are, as in TRL."""
        import torch

        weights = torch.tensor(self.weights, dtype=torch.float64)
        none = torch.isnan(self.values).all(dim=1)
        return (self.values * weights).nansum(dim=1).masked_fill(none, math.nan)
