"""Which values are tried: all of a grid, random ones, or what one of Optuna's samplers asks for.

Each draw is decided by a seed and by what is known so far, so that a sweep that is resumed after a
kill draws the same again.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.errors import InputError
from lorakit.sweeps.space.sweep_settings import Range, SweepSettings

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

Changes = dict[str, Any]

MOST = 1000  # configurations of one sweep
_A_ROUND = 4  # draws of Optuna's samplers before they learn what came of them
_TRIES = 50  # draws for each one that is new

_OPTUNA = {
    "tpe": "TPESampler",
    "gp": "GPSampler",
    "cmaes": "CmaEsSampler",
    "qmc": "QMCSampler",
    "nsgaii": "NSGAIISampler",
}
_NEEDS = {"gp": "scipy", "qmc": "scipy", "cmaes": "cmaes"}


@dataclass(frozen=True)
class Outcome:
    """What came of a draw: the loss where its training ended or was stopped."""

    changes: Changes
    value: float


class Sampler(Protocol):
    """Draws configurations, round by round."""

    def draw(self, before: Sequence[Changes], known: Sequence[Outcome]) -> list[Changes]:
        """The next round; an empty one is the end.

        Args:
            before: all that was drawn.
            known: what came of it, except of what diverged.
        """


def sampler_of(settings: SweepSettings, seed: int) -> Sampler:
    """The sampler that `settings` name; raises InputError where there is nothing to draw."""
    over, trials = settings.over, settings.trials
    if not over:
        raise InputError("nothing is swept: give --over KEY=VALUES, as in --over lora.r=4,8,16")
    for key, values in over.items():
        if isinstance(values, list):
            _check_values(key, values)
    size = math.prod(len(values) for values in over.values() if isinstance(values, list))
    ranges = [key for key, values in over.items() if isinstance(values, Range)]
    if trials is None:
        if ranges:
            raise InputError(
                f"--over {ranges[0]}: a range has no grid: give its values, or --sampler random"
            )
        if size > MOST:
            raise InputError(
                f"the grid has {size:,} configurations, and a sweep takes {MOST:,}: draw some of "
                "them with --sampler random --trials N"
            )
        lists: Any = over.values()
        return _Once([dict(zip(over, values, strict=True)) for values in product(*lists)])
    if trials > MOST:
        raise InputError(f"sweep.trials is {trials:,}, and a sweep takes {MOST:,}")
    if not ranges and trials > size:
        raise InputError(
            f"sweep.trials is {trials}, and there are {size} configurations: "
            "leave --sampler and --trials out"
        )
    if settings.sampler == "random":
        return _Once(_random_points(over, trials, seed))
    return _Optuna(over, trials, seed, settings.sampler)


def _check_values(key: str, values: list[Any]) -> None:
    if not values:
        raise InputError(f"--over {key} has no values: the grid is empty")
    texts = [_text(value) for value in values]
    for text in texts:
        if texts.count(text) > 1:
            raise InputError(f"--over {key} has {text} twice: its configurations are the same")


@dataclass(frozen=True)
class _Once:
    """All points in one round: a grid, or random draws."""

    points: list[Changes]

    def draw(self, before: Sequence[Changes], known: Sequence[Outcome]) -> list[Changes]:
        return [] if before else self.points


def _random_points(over: Mapping[str, Range | list[Any]], trials: int, seed: int) -> list[Changes]:
    """Each value drawn by itself, no point twice."""
    draws = random.Random(seed)
    found: dict[str, Changes] = {}
    for _ in range(_TRIES * trials):
        changes = {key: _one_of(values, draws) for key, values in over.items()}
        found.setdefault(_text(changes), changes)
        if len(found) == trials:
            break
    return list(found.values())


class _Optuna:
    """One of Optuna's samplers, asked for a few draws at a time."""

    def __init__(
        self, over: Mapping[str, Range | list[Any]], trials: int, seed: int, name: str
    ) -> None:
        for package in ("optuna", _NEEDS.get(name, "optuna")):
            if not find_spec(package):
                raise InputError(
                    f"the sampler {name} needs {package}: pip install 'lorakit[sweep]'"
                )
        self.over, self.trials, self.seed, self.name = over, trials, seed, name

    def draw(self, before: Sequence[Changes], known: Sequence[Outcome]) -> list[Changes]:
        """The next few that were not drawn before; Optuna learns of those that are known."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = {key: _distribution(values) for key, values in self.over.items()}
        # A new study for each round: its draws depend on what it is told here, and on nothing else.
        study = optuna.create_study(sampler=self._sampler(len(before)))
        study.add_trials(
            optuna.trial.create_trial(
                params={
                    k: v if isinstance(self.over[k], Range) else _text(v)
                    for k, v in outcome.changes.items()
                },
                distributions=distributions,
                value=outcome.value,
            )
            for outcome in known
        )
        seen = {_text(changes) for changes in before}
        found: list[Changes] = []
        wanted = min(_A_ROUND, self.trials - len(before))
        for _ in range(_TRIES * wanted):
            asked = study.ask(distributions).params
            changes = {
                key: asked[key] if isinstance(values, Range) else json.loads(asked[key])
                for key, values in self.over.items()
            }
            if _text(changes) not in seen:
                seen.add(_text(changes))
                found.append(changes)
            if len(found) == wanted:
                break
        return found

    def _sampler(self, drawn: int) -> BaseSampler:
        import optuna

        options: dict[str, Any] = {"seed": (self.seed + drawn) % 2**32}
        if self.name in ("tpe", "gp"):
            options["n_startup_trials"] = _A_ROUND
        if self.name == "tpe":
            options["constant_liar"] = True  # the draws of a round should differ
        return getattr(optuna.samplers, _OPTUNA[self.name])(**options)


def _distribution(values: Range | list[Any]) -> BaseDistribution:
    from optuna import distributions

    if isinstance(values, list):
        return distributions.CategoricalDistribution([_text(value) for value in values])
    if values.whole:
        return distributions.IntDistribution(int(values.low), int(values.high), log=values.by_log)
    return distributions.FloatDistribution(values.low, values.high, log=values.by_log)


def _one_of(values: Range | list[Any], draws: random.Random) -> Any:
    if isinstance(values, list):
        return draws.choice(values)
    if values.by_log:
        drawn = math.exp(draws.uniform(math.log(values.low), math.log(values.high)))
    else:
        drawn = draws.uniform(values.low, values.high)
    if values.whole:
        return min(max(round(drawn), int(values.low)), int(values.high))
    return float(f"{drawn:.4g}")  # more figures say no more


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
