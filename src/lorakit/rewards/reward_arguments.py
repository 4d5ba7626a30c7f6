"""How a reward function is called: TRL's signature, with the columns of the rows by name.

A function with `**kwargs` gets everything, another one what it names. Which of its parameters no
column gives is known before a run (`missing`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from lorakit.rewards.reward_table import RewardInput

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What functions get beside the columns; no column may have such a name."""
ALSO = ("finish_reason", "reference")
"""More of each completion, where no column has that name."""
STATE: dict[str, Any] = {"global_step": 0, "max_steps": 0, "epoch": 0.0}
"""What `trainer_state` has, before a run."""

OTHER_SIGNATURES = {
    "solution_str": "verl",
    "ground_truth": "verl",
    "data_source": "verl",
    "queries": "OpenRLHF",
    "labels": "OpenRLHF",
    "reward_model": "verl",
    "predict_str": "EasyR1",
    "predicts": "EasyR1",
    "reward_inputs": "EasyR1",
}
"""Parameters of reward functions that were written for other libraries, which call them so."""


@dataclass(frozen=True)
class RewardCall:
    """What functions are called with, for N completions; it travels to other processes.

    Attributes:
        columns: of each name N values.
        state: of the trainer, as `STATE`.
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, asked: Sequence[RewardInput], names: Iterable[str], state: dict[str, Any]
    ) -> RewardCall:
        """The call for these completions; a row that lacks one of the columns has None there."""
        columns: dict[str, list[Any]] = {name: [getattr(a, name) for a in asked] for name in ALSO}
        known = dict.fromkeys([*names, *(name for one in asked for name in one.columns)])
        columns |= {name: [one.columns.get(name) for one in asked] for name in known}
        return cls(
            [one.prompt for one in asked],
            [one.completion for one in asked],
            [list(one.completion_ids) for one in asked],
            columns,
            STATE | state,
        )

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, chosen: Sequence[int]) -> RewardCall:
        """The call for some of the completions."""

        def of(values: list[Any]) -> list[Any]:
            return [values[i] for i in chosen]

        return replace(
            self,
            prompts=of(self.prompts),
            completions=of(self.completions),
            completion_ids=of(self.completion_ids),
            columns={name: of(values) for name, values in self.columns.items()},
        )


class RewardLog:
    """What a function logs in a call: TRL's `log_metric` and `log_extra`."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Logs a number; those of one name are averaged."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Logs a value for each completion."""
        self.extra.setdefault(str(column), []).extend(values)


def keyword_arguments(
    function: Callable[..., Any], call: RewardCall, log: RewardLog
) -> dict[str, Any]:
    """The arguments by name; lists and messages are copies, so that a function may change them."""
    given = {
        "prompts": _copied(call.prompts),
        "completions": _copied(call.completions),
        "completion_ids": _copied(call.completion_ids),
        **{name: _copied(values) for name, values in call.columns.items()},
        "trainer_state": SimpleNamespace(**call.state),
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }
    takes, everything = parameters(function)
    return given if everything else {name: given[name] for name in takes if name in given}


def parameters(function: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """The names that a function can be called with, each with whether it must be, and whether it
    takes all others too."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return {}, True
    takes = {
        name: one.default is inspect.Parameter.empty
        for name, one in signature.parameters.items()
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }
    kinds = [one.kind for one in signature.parameters.values()]
    return takes, inspect.Parameter.VAR_KEYWORD in kinds


def missing(required: Iterable[str], columns: Collection[str]) -> list[str]:
    """Those of the parameters that neither TRL's arguments nor the columns give."""
    return [name for name in required if name not in (*ARGUMENTS, *ALSO) and name not in columns]


def _copied(value: Any) -> Any:
    """A copy of lists and dictionaries; what is in them otherwise is the same."""
    if isinstance(value, list):
        if {list, dict}.isdisjoint(map(type, value)):  # tokens, mostly
            return value[:]
        return [_copied(one) for one in value]
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return value
