"""A user's environment, as its own process runs it: what it is made of, and one call of it.

An environment is a class with `reset`, and either `step` (as in Gymnasium) or tools: its public
methods, as in TRL. Functions alone, without a class, are tools too. Every value that leaves this
file is made of JSON's types.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import InputError, did_you_mean, first_line, listed, one_line
from lorakit.rewards.load_rewards import RewardLoadError, hashes, load_file, load_module

_NO_TOOLS = ("reset", "step", "get_reward", "close")


class ReturnedError(Exception):
    """A user's code returned something that is not what it should return."""


def load(spec: str) -> Any:
    """What `FILE.py:NAME` or `MODULE:NAME` names.

    Raises:
        InputError: there is no such file, module or name, or it raises when it is imported.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name or name.endswith(".py"):
        raise InputError(f"'{spec}' is not FILE.py:NAME or MODULE:NAME")
    is_file = place.endswith(".py")
    if is_file and not Path(place).expanduser().is_file():
        raise InputError(f"there is no file {place}")
    try:
        if place not in _loaded:
            file = str(Path(place).expanduser())
            _loaded[place] = load_file(file) if is_file else load_module(place)
    except RewardLoadError as error:
        raise InputError(f"{place}: {error}") from error
    if not hasattr(_loaded[place], name):
        public = [n for n in vars(_loaded[place]) if not n.startswith("_")]
        raise InputError(
            f"{place} has no {name}{did_you_mean(name, public)}; it has {listed(public) or 'none'}"
        )
    found = getattr(_loaded[place], name)
    if not callable(found):
        raise InputError(f"{spec} is a {type(found).__name__}, and no class or function")
    return found


_loaded: dict[str, Any] = {}


def loaded_files() -> dict[str, str]:
    """SHA-256 of the files that `load` has imported, and of what they import from beside them, by
    name."""
    return {name: sha for module in _loaded.values() for name, sha in hashes(module).items()}


class EnvironmentClass:
    """An environment's class with tools beside it, or the tools alone.

    Args:
        factory: makes an environment; None for tools alone.
        functions: tools beside its own.

    Raises:
        InputError: it has no `reset`, a tool cannot be described, or there is nothing to call.
    """

    def __init__(self, factory: Callable[[], Any] | None, functions: Sequence[Any] = ()) -> None:
        self._factory, self._functions = factory, functions
        try:
            sample = factory() if factory else None
        except Exception as error:
            raise InputError(f"the environment cannot be made: {described(error)}") from error
        if factory and not callable(getattr(sample, "reset", None)):
            raise InputError("the environment has no method reset")
        self.steps = callable(getattr(sample, "step", None))
        self.rewards = callable(getattr(sample, "get_reward", None))
        tools = self.tools(sample)
        if not self.steps and not tools:
            raise InputError("the environment has neither a method step nor tools to call")
        self.schemas = [_schema(name, tool) for name, tool in tools.items()]

    def tools(self, environment: Any) -> dict[str, Any]:
        """The functions that the model can call, by name, bound to `environment`."""
        found = {_name(function): function for function in self._functions}
        if environment is None:
            return found
        own = getattr(environment, "tools", None)
        if isinstance(own, (list, tuple)):
            return found | {_name(one): one for one in own}
        if self.steps:  # it reads the calls itself
            return found
        methods = inspect.getmembers(type(environment), predicate=inspect.isfunction)
        names = [n for n, _ in methods if not n.startswith("_") and n not in _NO_TOOLS]
        return found | {name: getattr(environment, name) for name in names}

    def made(self, seed: int) -> Environment:
        """A new environment; random numbers of Python and numpy follow from `seed`."""
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        return Environment(self, self._factory() if self._factory else None, seed)

    def description(self) -> dict[str, Any]:
        """What the process that asks has to know of it."""
        own = {"steps": self.steps, "rewards": self.rewards, "tools": self.schemas}
        return own | {"files": loaded_files()}


class Environment:
    """One environment, for one conversation. Each method is a request by its name."""

    def __init__(self, kind: EnvironmentClass, own: Any, seed: int) -> None:
        self._own, self._seed = own, seed
        self._tools = kind.tools(own)
        self._loop: asyncio.AbstractEventLoop | None = None

    def reset(self, row: Mapping[str, Any]) -> Any:
        """What `reset` returned: None, a text, or messages."""
        if self._own is None:
            return None
        given = dict(row)
        takes = inspect.signature(self._own.reset).parameters
        if "seed" in takes:
            given.setdefault("seed", self._seed)
        if not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
            given = {name: value for name, value in given.items() if name in takes}
        return messages_of(self._done(self._own.reset(**given)), "reset")

    def step(self, message: dict[str, Any]) -> dict[str, Any]:
        """What `step` returned, as `messages`, `reward`, `done` and `metrics`."""
        found = self._done(self._own.step(message))
        if not isinstance(found, (list, tuple)) or len(found) not in (3, 4, 5):
            raise ReturnedError(
                f"step returned {_shown(found)}: return (observation, reward, done), with a "
                "dictionary of metrics behind them or as Gymnasium's five"
            )
        observation, reward, done, *more = found
        metrics = more[-1] if more else {}
        if len(found) == 5:
            done = done or more[0]
        return {
            "messages": messages_of(observation, "step"),
            "reward": number_of(reward, "step") or 0.0,
            "done": bool(done),
            "metrics": _numbers(metrics),
        }

    def call(self, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The results of functions that the model calls, in order; a failure is a result too."""
        return [self._called(one["name"], one["arguments"]) for one in calls]

    def get_reward(self) -> float | None:
        """What `get_reward` returned."""
        return number_of(self._done(self._own.get_reward()), "get_reward")

    def close(self) -> None:
        """Calls `close`, where there is one."""
        if callable(closing := getattr(self._own, "close", None)):
            self._done(closing())

    def _called(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        function = self._tools.get(name)
        if function is None:
            known = ", ".join(self._tools) or "none"
            return {
                "content": f"error: there is no function {name}; there are: {known}",
                "ok": False,
            }
        try:
            result = self._done(function(**arguments))
        except Exception as error:  # the model reads it, and may do better
            said = first_line(error)
            return {"content": f"error: {type(error).__name__}: {said}", "ok": False}
        if isinstance(result, str):
            return {"content": result, "ok": True}
        try:
            text = json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError):
            text = str(result)
        return {"content": text, "ok": True}

    def _done(self, value: Any) -> Any:
        """The value, or what it is when it is awaited: all in one event loop."""
        if not inspect.isawaitable(value):
            return value

        async def awaited() -> Any:
            return await value

        self._loop = self._loop or asyncio.new_event_loop()
        return self._loop.run_until_complete(awaited())


def messages_of(value: Any, whose: str) -> Any:
    """An observation: None, a text, or messages as `{role, content}`; one message may stand alone.

    Raises:
        ReturnedError: it is none of these.
    """
    if value is None or isinstance(value, str):
        return value
    given = [value] if isinstance(value, Mapping) else value
    if not isinstance(given, (list, tuple)):
        raise ReturnedError(f"{whose} returned {_shown(value)}: return a text or messages")
    found = []
    for one in given:
        sound = isinstance(one, Mapping) and isinstance(one.get("content"), str)
        if not sound or one.get("role") not in ("system", "user", "tool"):
            raise ReturnedError(
                f"{whose} returned {_shown(one)} as a message: return "
                "{role, content} with a text, and the role user, tool or system"
            )
        found.append({str(key): plain for key, plain in one.items()})
    return json.loads(json.dumps(found, default=str))


def number_of(value: Any, whose: str) -> float | None:
    """A reward as a number. Raises ReturnedError where it is none, or NaN or Inf."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ReturnedError(f"{whose} gave the reward {_shown(value)}: give a number") from error
    if not math.isfinite(number):
        raise ReturnedError(f"{whose} gave the reward {number}: give a finite number, or None")
    return number


def described(error: BaseException) -> str:
    """What an error of a user's code says, and the line of that code: on one line."""
    kind, said = type(error).__name__, first_line(error)
    text = said if isinstance(error, ReturnedError) or said == kind else f"{kind}: {said}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    theirs = [f for f in frames if "lorakit" not in Path(f.filename).parts and f.lineno]
    theirs = [f for f in theirs if not f.filename.startswith("<frozen")]
    place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    return one_line(text + place)


def _schema(name: str, function: Any) -> dict[str, Any]:
    if isinstance(function, Mapping):
        return dict(function)
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        return dict(get_json_schema(function))
    except Exception as error:
        raise InputError(
            f"the tool {name} cannot be described to the model: {first_line(error)} (a tool has "
            "types for its arguments, and a docstring with an Args: block)"
        ) from error


def _name(function: Any) -> str:
    if isinstance(function, Mapping):
        return str(function.get("function", function).get("name"))
    return str(function.__name__)


def _numbers(values: Any) -> dict[str, float]:
    """Those of the values that are numbers; a dictionary of Gymnasium's may hold anything."""
    if not isinstance(values, Mapping):
        return {}
    kinds = (bool, int, float)
    found = {str(k): float(v) for k, v in values.items() if isinstance(v, kinds)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{'…' if len(text) > 60 else ''} ({type(value).__name__})"
