"""The rewards of a run: opened by what a recipe names, and asked for all completions of a step.

What fails is a stated rule. A function that raises, hangs, ends its process or returns the wrong
number of values is called for each completion alone, to find those that it fails on, and then again
for all others together. What it fails on has no reward from it, as where it gives None, and is
counted and named. After `FAILURES` calls in a row in which it gave no reward to any completion, the
run stops.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lorakit.errors import InputError, LorakitError, did_you_mean, listed
from lorakit.rewards.builtin import built_in, columns_of
from lorakit.rewards.calling import Outcome
from lorakit.rewards.reward_arguments import (
    ARGUMENTS,
    OTHER_SIGNATURES,
    RewardCall,
    missing,
)
from lorakit.rewards.reward_process import RewardProcess
from lorakit.rewards.reward_specs import RewardSpec, read_specs, read_weights
from lorakit.rewards.reward_table import RewardInput, RewardProblem, RewardTable
from lorakit.rewards.rewards_here import RewardsHere

SECONDS = 60.0
"""How long a call of a function, for all completions of a step, may take by default."""
FAILURES = 3
"""Calls in a row without any reward from a function after which the run stops."""
_MOST_ENDED = 8  # processes, in the search for the completions that a function fails on

Scorer = Callable[[Sequence[RewardInput]], Sequence[float | None]]
"""Scores completions by a model."""
OpenScorer = Callable[[str], Scorer]
"""Opens the scorer of an adapter, by its folder. Raises InputError where it cannot be one."""


class _Runner(Protocol):
    """Where functions run: another process, or this one."""

    required: list[list[str]]
    files: dict[str, str]

    def ask(
        self, which: Sequence[int], call: RewardCall, seconds: float | None
    ) -> dict[int, Outcome]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Group:
    """Functions that run in one place: their positions among all, and the runner."""

    positions: tuple[int, ...]
    runner: _Runner


class Rewards:
    """Reward functions; each call scores all completions of a step.

    Attributes:
        names: of the functions, each another one.
        weights: of each in the total.
        timeout: seconds that a call of a function may take; None for no limit.
        stops: a function that fails again and again stops the run.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        weights: tuple[float, ...],
        timeout: float | None,
        groups: Sequence[_Group],
        scorers: Mapping[int, Scorer],
    ) -> None:
        self.names = tuple(spec.name for spec in specs)
        self.weights, self.timeout = weights, timeout
        self._specs, self._groups, self._scorers = list(specs), list(groups), dict(scorers)
        self._needed = [
            (specs[i].name, [*required, *_columns_of(specs[i])])
            for group in groups
            for i, required in zip(group.positions, group.runner.required, strict=True)
        ]
        self._columns: dict[str, None] = {}
        self._in_a_row = Counter[str]()
        self.stops = True

    @classmethod
    def opened(
        cls,
        specs: Any,
        weights: Sequence[float] | None = None,
        timeout: float | None = SECONDS,
        folder: Path | None = None,
        scorer: OpenScorer | None = None,
    ) -> Rewards:
        """Loads what `specs` name: this runs users' files.

        Args:
            specs: as in a recipe's `rewards` (`reward_specs.read_specs`), or functions.
            weights: a number for each; None is 1 for all.
            timeout: seconds for a call of a function; None for no limit.
            folder: where relative paths begin; None is the present folder.
            scorer: opens reward adapters; None where there is no model.

        Raises:
            InputError: one cannot be loaded, or the weights do not fit.
        """
        read = read_specs(specs, folder)
        numbers = read_weights(weights, len(read))
        if timeout is not None and not timeout > 0:
            raise InputError(f"reward_timeout is {timeout!r}: give seconds above 0")
        groups: list[_Group] = []
        scorers: dict[int, Scorer] = {}
        try:
            for kind, source, positions in _sources(read):
                if kind == "adapter":
                    for i in positions:
                        scorers[i] = _open(scorer, read[i])
                    continue
                groups.append(
                    _Group(positions, _runner(kind, source, [read[i] for i in positions]))
                )
        except BaseException:
            for group in groups:
                group.runner.close()
            raise
        return cls(read, numbers, timeout, groups, scorers)

    def facts(self) -> list[dict[str, Any]]:
        """What the record of a run keeps of each reward, with the hashes of its files by name."""
        files = {i: group.runner.files for group in self._groups for i in group.positions}
        files |= {i: getattr(scorer, "files", {}) for i, scorer in self._scorers.items()}
        return [
            {
                "name": spec.name,
                "reward": spec.shown,
                "settings": dict(spec.settings),
                "weight": weight,
                "sha256": files.get(i, {}),
            }
            for i, (spec, weight) in enumerate(zip(self._specs, self.weights, strict=True))
        ]

    def check(self, columns: Sequence[str], where: str = "") -> None:
        """Whether rows with these columns give what the functions need; remembers the columns.

        Args:
            where: the rows, for messages.

        Raises:
            InputError: a column has the name of an argument, or a function needs one that is not
                there.
        """
        rows = f"{where}: " if where else ""
        _require_free(columns, rows)
        self._columns |= dict.fromkeys(columns)
        for reward, needed in self._needed:
            for name in missing(needed, columns):
                reason = f"needs the column {name}{did_you_mean(name, columns)}"
                if name in OTHER_SIGNATURES:
                    reason = (
                        f"takes {name}, as {OTHER_SIGNATURES[name]} calls reward functions: here "
                        "they are called as in TRL, with completions and the columns of the rows"
                    )
                if name == "environments":
                    reason = (
                        "takes environments, which are in processes of their own here: give the "
                        "environment a method get_reward() that returns its reward"
                    )
                raise InputError(
                    f"{rows}reward {reward} {reason}: the rows have {listed(columns) or 'none'}"
                )

    def __call__(
        self, asked: Sequence[RewardInput], state: Mapping[str, Any] | None = None
    ) -> RewardTable:
        """The rewards of all these completions.

        Args:
            state: of the trainer (`global_step`, `max_steps`, `epoch`), for functions that take
                `trainer_state`.

        Raises:
            InputError: a column has the name of an argument.
            LorakitError: a function has failed `FAILURES` times in a row.
        """
        call = RewardCall.of(asked, self._columns, dict(state or {}))
        _require_free(call.columns, "")
        outcomes: list[Outcome] = [Outcome() for _ in self.names]
        for i, outcome in self._asked(call, asked):
            outcomes[i] = outcome
        return self._table(outcomes, asked)

    def close(self) -> None:
        """Ends the processes of the functions."""
        for group in self._groups:
            group.runner.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- calls --------------------------------------------------------------------------------

    def _asked(
        self, call: RewardCall, asked: Sequence[RewardInput]
    ) -> Iterator[tuple[int, Outcome]]:
        """What each function gives; those of different files are called at the same time."""
        if not len(call):
            return
        away = [group for group in self._groups if isinstance(group.runner, RewardProcess)]
        with ThreadPoolExecutor(max(1, len(away))) as threads:
            try:
                answers = [threads.submit(self._of_group, group, call) for group in away]
                for group in self._groups:
                    if group not in away:
                        yield from self._of_group(group, call).items()
                for i, scorer in self._scorers.items():
                    yield i, _scored(scorer, asked)
                for answer in answers:
                    yield from answer.result().items()
            except BaseException:  # Ctrl-C: nobody waits for the functions
                for group in away:
                    group.runner.close()
                raise

    def _of_group(self, group: _Group, call: RewardCall) -> dict[int, Outcome]:
        """What each function of a group gives, by its position among all."""
        found = group.runner.ask(range(len(group.positions)), call, self.timeout)
        for number, outcome in found.items():
            if outcome.failure and len(call) > 1:
                ask = partial(_one, group.runner, number)
                found[number] = self._without_failing(ask, call, outcome)
        return {group.positions[number]: outcome for number, outcome in found.items()}

    def _without_failing(
        self,
        ask: Callable[[RewardCall, float | None], Outcome],
        call: RewardCall,
        whole: Outcome,
    ) -> Outcome:
        """What a function gives that failed for all completions together.

        A completion alone gets a quarter of the limit of a call, or a second where that is more,
        and the search as much as eight of them, and as many processes.
        """
        begun, ended = time.monotonic(), 0
        limit = self.timeout
        alone_limit = None if limit is None else min(limit, max(limit / 4, 1.0))
        causes: dict[int, str] = {}
        for i in range(len(call)):
            taken = time.monotonic() - begun
            late = alone_limit is not None and taken >= _MOST_ENDED * alone_limit
            if late or ended >= _MOST_ENDED:
                break
            alone = ask(call.rows([i]), alone_limit)
            if cause := alone.failure or alone.causes.get(0, ""):
                causes[i] = cause
            ended += alone.ended
        rest = [i for i in range(len(call)) if i not in causes]
        again = Outcome(failure=whole.failure)
        if rest and causes:
            again = ask(call.rows(rest), limit)
        for number, i in enumerate(rest):
            if again.failure:
                causes[i] = again.failure
            elif number in again.causes:
                causes[i] = again.causes[number]
        if not again.failure:
            values: list[float | None] = [None] * len(call)
            for i, value in zip(rest, again.values, strict=True):
                values[i] = value
            return Outcome(values, causes, metrics=again.metrics, seconds=whole.seconds)
        if len(causes) == len(call) and len(set(causes.values())) == 1:
            return whole
        return Outcome([None] * len(call), causes, seconds=whole.seconds)

    # --- the table ----------------------------------------------------------------------------

    def _table(self, outcomes: Sequence[Outcome], asked: Sequence[RewardInput]) -> RewardTable:
        import torch

        values = torch.full((len(asked), len(self.names)), math.nan, dtype=torch.float64)
        problems: list[RewardProblem] = []
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        for i, (name, outcome) in enumerate(zip(self.names, outcomes, strict=True)):
            causes = outcome.causes
            if outcome.failure:
                causes = dict.fromkeys(range(len(asked)), outcome.failure)
            for j, value in enumerate(outcome.values):
                values[j, i] = math.nan if value is None else value
            problems += _problems(name, causes, asked)
            extra |= outcome.extra
            for key, given in outcome.metrics.items():
                metrics.setdefault(key, []).extend(given)
            self._count(name, causes, len(asked))
        lacking = torch.isnan(values).all(dim=1)
        failed = {problem.name for problem in problems}
        if lacking.any() and not failed:
            first = int(lacking.nonzero()[0])
            cause = "every function gave None: at least one should apply to each row"
            problems.append(RewardProblem("", asked[first].where, cause, int(lacking.sum())))
        means = {key: sum(given) / len(given) for key, given in metrics.items() if given}
        seconds = {n: o.seconds for n, o in zip(self.names, outcomes, strict=True)}
        return RewardTable(self.names, self.weights, values, tuple(problems), means, extra, seconds)

    def _count(self, name: str, causes: Mapping[int, str], completions: int) -> None:
        """Counts calls without any reward. Raises LorakitError after several in a row."""
        if not completions or len(causes) < completions:
            self._in_a_row[name] = 0
            return
        self._in_a_row[name] += 1
        if self.stops and self._in_a_row[name] >= FAILURES:
            cause = Counter(causes.values()).most_common(1)[0][0]
            raise LorakitError(
                f"reward {name} gave no reward in {FAILURES} calls in a row: {cause}; try it with "
                "lorakit rewards"
            )


def functions_of(path: str) -> list[str]:
    """The reward functions in a file, as specs (`rewards.py:name`). It runs the file.

    Raises:
        InputError: it cannot be loaded, or has none.
    """
    if not Path(path).is_file():
        raise InputError(f"rewards: there is no file {path}")
    process = RewardProcess("file", path, [], everything=True)
    process.close()
    if not process.found:
        raise InputError(
            f"rewards: {path} has no reward function: one has a parameter completions and returns "
            "a list with a number for each"
        )
    return [f"{path}:{name}" for name in process.found]


def _require_free(columns: Iterable[str], rows: str) -> None:
    """Raises InputError for a column with the name of an argument."""
    if taken := [name for name in columns if name in ARGUMENTS]:
        raise InputError(
            f"{rows}the column {taken[0]} has the name of an argument that reward functions get "
            "anyway: rename it, or drop it if nothing reads it"
        )


def _sources(specs: Sequence[RewardSpec]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The places where functions run, (kind, source, positions): one process for each file or
    module, one for all built-in ones."""
    found: dict[tuple[str, str], list[int]] = {}
    for i, spec in enumerate(specs):
        source = spec.source if spec.kind in ("file", "module") else ""
        found.setdefault((spec.kind, source), []).append(i)
    return [(kind, source, tuple(positions)) for (kind, source), positions in found.items()]


def _runner(kind: str, source: str, specs: Sequence[RewardSpec]) -> _Runner:
    if kind == "python":
        functions = [
            partial(spec.function, **spec.settings) if spec.settings else spec.function
            for spec in specs
            if spec.function is not None
        ]
        return RewardsHere(functions)
    named = [
        (spec.source if kind == "builtin" else spec.attribute, dict(spec.settings))
        for spec in specs
    ]
    return RewardProcess(kind, source, named)


def _columns_of(spec: RewardSpec) -> list[str]:
    """The columns that a built-in reward reads; those of other ones are their parameters."""
    return columns_of(built_in(spec.source, spec.settings)) if spec.kind == "builtin" else []


def _open(scorer: OpenScorer | None, spec: RewardSpec) -> Scorer:
    path = str(spec.settings["path"])
    if scorer is None:
        raise InputError(f"rewards: the adapter {path} needs a model, and there is none here")
    return scorer(path)


def _one(runner: _Runner, number: int, call: RewardCall, seconds: float | None) -> Outcome:
    return runner.ask([number], call, seconds)[number]


def _scored(scorer: Scorer, asked: Sequence[RewardInput]) -> Outcome:
    from lorakit.rewards.returned_rewards import read_rewards

    begun = time.perf_counter()
    values, causes = read_rewards(scorer(asked), len(asked))
    return Outcome(values, causes, seconds=time.perf_counter() - begun)


def _problems(
    name: str, causes: Mapping[int, str], asked: Sequence[RewardInput]
) -> Iterator[RewardProblem]:
    """One for each kind of cause, with its first row."""
    kinds: dict[str, list[int]] = {}
    for i, cause in sorted(causes.items()):
        kinds.setdefault(re.split("[:(]", cause)[0], []).append(i)
    for rows in kinds.values():
        yield RewardProblem(name, asked[rows[0]].where, causes[rows[0]], len(rows))
