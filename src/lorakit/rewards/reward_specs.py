"""The `rewards` of a recipe: what each names, without running any of it.

`rewards.py:valid_json` is a function of a file, `module:name` one of a module, and another name one
of the built-in ones. With settings it is a mapping: `{type: regex, pattern: "^[0-9]+$"}`, or in
short `{regex: "^[0-9]+$"}`. From Python a function can be given itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import InputError, did_you_mean, listed
from lorakit.rewards.builtin import BUILT_IN, built_in, main_setting

ADAPTER = "adapter"
"""The built-in reward that an adapter of objective reward gives; it needs the resident model."""
_TRLS = {
    "accuracy_reward": "math_verify",
    "think_format_reward": "format",
    "reasoning_accuracy_reward": "{type: math_verify, after: </think>}",
}
"""TRL's names of built-in rewards, as they are called here."""
_SWIFTS = {
    "accuracy": "math_verify",
    "cosine": "length",
    "soft_overlong": "overlong",
    "react_format": "regex",
}
"""ms-swift's names of them."""


@dataclass(frozen=True)
class RewardSpec:
    """One reward.

    Attributes:
        kind: where its function comes from.
        source: a file's path, a module's name, or the name of a built-in one.
        attribute: the name in the file or module; empty where none is given.
        settings: of a built-in one; keyword arguments of a function, or of a class.
        name: what it is called in tables and logs.
        function: given from Python.
    """

    kind: Literal["builtin", "file", "module", "python", "adapter"]
    source: str
    attribute: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    function: Callable[..., Any] | None = None

    @property
    def shown(self) -> str:
        """As a recipe has it."""
        return f"{self.source}:{self.attribute}" if self.attribute else self.source


def read_specs(rewards: Any, folder: Path | None = None) -> list[RewardSpec]:
    """What `rewards` names, each with a name of its own.

    Args:
        rewards: one, or a list.
        folder: where relative paths begin; None is the present folder.

    Raises:
        InputError: one cannot be read, names no file, or has settings that a built-in one lacks.
    """
    given = [rewards] if _is_one(rewards) else rewards
    if not isinstance(given, Sequence) or not given:
        raise InputError(
            "rewards: give a list with at least one, such as rewards.py:valid_json or one of "
            f"{listed([*BUILT_IN, ADAPTER])}"
        )
    return _named([_spec(one, folder or Path()) for one in given])


def foreign_rewards(objective: Any) -> list[str]:
    """The rewards of a recorded `objective` that are neither built in nor adapters: somebody's
    programs, which a record alone is no reason to run."""
    given = objective.get("rewards") if isinstance(objective, Mapping) else None
    return [str(one) for one in given or () if not is_own(one)]


def foreign_programs(objective: Any) -> list[str]:
    """`foreign_rewards`, and the environment and tools, which are programs in the same sense."""
    given = objective if isinstance(objective, Mapping) else {}
    environment = given.get("environment")
    if isinstance(environment, Mapping):
        environment = environment.get("type", environment)
    more = [*([environment] if environment else []), *(given.get("tools") or ())]
    return [*foreign_rewards(objective), *map(str, more)]


def is_own(reward: Any) -> bool:
    """Whether a recorded reward is a built-in one, or an adapter."""
    if isinstance(reward, Mapping):
        reward = reward.get("type") or next(iter(reward), None)
    return reward == ADAPTER or reward in BUILT_IN


def adapters_in(rewards: Sequence[Any]) -> list[str]:
    """The folders of those rewards, as a recipe has them, that are reward adapters."""
    given = [one for one in rewards if isinstance(one, Mapping) and is_own(one)]
    read = [_spec(one, Path()) for one in given if ADAPTER in (*one, one.get("type"))]
    return [str(one.settings["path"]) for one in read]


def _is_one(rewards: Any) -> bool:
    return isinstance(rewards, (str, Mapping)) or callable(rewards)


def read_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The weights of so many rewards; by default 1 each.

    Raises:
        InputError: there are more or fewer than rewards, one is not a number, or all are 0.
    """
    if weights is None:
        return (1.0,) * count
    if isinstance(weights, (str, Mapping)) or not isinstance(weights, Sequence):
        raise InputError(f"weights: give a list with a number for each reward, not {weights!r}")
    for one in weights:
        number = isinstance(one, (int, float)) and not isinstance(one, bool)
        if not number or not math.isfinite(one):
            raise InputError(f"weights: {one!r} is not a number")
    if len(weights) != count:
        raise InputError(
            f"weights: there are {len(weights)} for {count} rewards: give one for each, in the "
            "order of rewards"
        )
    if not any(weights):
        raise InputError("weights: all are 0, so that there is nothing to learn")
    return tuple(float(one) for one in weights)


def _spec(given: Any, folder: Path) -> RewardSpec:
    settings: dict[str, Any] = {}
    name = ""
    if isinstance(given, Mapping):
        given, settings, name = _of_mapping(given)
    if callable(given):
        return RewardSpec("python", "python", _name_of(given), settings, name, given)
    if not isinstance(given, str) or not given.strip():
        raise InputError(f"rewards: {given!r} names no reward: give a text or a mapping with type")
    path, attribute = _split(given)
    if path.endswith(".py"):
        file = Path(path).expanduser()
        file = file if file.is_absolute() else folder / file
        if not file.is_file():
            raise InputError(f"rewards: there is no file {path}")
        return RewardSpec("file", str(file), attribute, settings, name)
    if attribute and path == "python":
        raise InputError(
            f"rewards: {attribute} was a function given from Python, which no record can hold: "
            "give it again"
        )
    if attribute:
        return RewardSpec("module", path, attribute, settings, name)
    if path == ADAPTER:
        if set(settings) != {"path"} or not isinstance(settings["path"], str):
            raise InputError("rewards: adapter has one setting, the path: {adapter: runs/reward}")
        return RewardSpec("adapter", path, "", settings, name)
    if path not in BUILT_IN:
        raise _unknown(path)
    built_in(path, settings)  # so that wrong settings are found here
    return RewardSpec("builtin", path, "", settings, name)


def _unknown(name: str) -> InputError:
    known = [*BUILT_IN, ADAPTER]
    module, _, attribute = name.rpartition(".")
    cure = f"a function of yours is named as rewards.py:{name}"
    if module:  # as TRL's command line and Axolotl have it
        cure = f"a function of a module is named as {module}:{attribute}"
    elif name in _TRLS:
        cure = f"TRL's is {_TRLS[name]} here, or trl.rewards:{name}"
    elif name in _SWIFTS:
        cure = f"ms-swift's is nearest to {_SWIFTS[name]} here"
    return InputError(
        f"rewards: there is no '{name}'{did_you_mean(name, known)}: built in are "
        f"{listed(known, 20)}; {cure}"
    )


def _of_mapping(given: Mapping[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """The type, the settings and the name that a mapping gives."""
    values = dict(given)
    if "type" not in values:
        if len(values) != 1:
            raise InputError(
                f"rewards: {dict(given)} has no type: write {{type: regex, pattern: …}}"
            )
        ((kind, short),) = values.items()
        main = "path" if kind == ADAPTER else main_setting(kind)
        if isinstance(short, Mapping) and main is None:
            return kind, dict(short), ""
        if main is None:
            raise InputError(f"rewards: {kind} takes no value: write {{type: {kind}}}")
        return kind, {main: short}, ""
    kind, name = values.pop("type"), values.pop("name", "")
    if not isinstance(name, str):
        raise InputError(f"rewards: name is {name!r}: give a text")
    return kind, values, name


def _split(given: str) -> tuple[str, str]:
    """`rewards.py:name` in two; a colon of a drive is none."""
    before, colon, behind = given.rpartition(":")
    if not colon or given.endswith(".py"):
        return given, ""
    return before, behind


def _name_of(function: Callable[..., Any]) -> str:
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "lambda" if name == "<lambda>" else str(name)


def _named(specs: list[RewardSpec]) -> list[RewardSpec]:
    """The specs with names, each another one: `valid_json`, `valid_json_2`."""
    own = Counter(spec.name for spec in specs if spec.name)
    if twice := [name for name, times in own.items() if times > 1]:
        raise InputError(f"rewards: two have the name {twice[0]}: give each its own")
    taken = set(own)
    named = []
    for spec in specs:
        if not spec.name:
            usual = spec.attribute or Path(spec.source).stem
            name, number = usual, 1
            while name in taken:
                number += 1
                name = f"{usual}_{number}"
            spec = replace(spec, name=name)
        taken.add(spec.name)
        named.append(spec)
    return named
