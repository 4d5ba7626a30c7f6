"""Calls reward functions one after the other, and those that are async together.

It is the same in a process of a user's file as in this one for functions given from Python; the
limits of time are theirs.
"""

from __future__ import annotations

import inspect
import json
import re
import sysconfig
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import first_line, one_line
from lorakit.rewards.returned_rewards import RewardFailedError, read_rewards
from lorakit.rewards.reward_arguments import RewardCall, RewardLog, keyword_arguments
from lorakit.time_limit import TimeLimitError

_OF_LIST = re.compile(
    r"'list' object has no attribute '(strip|split|lower|upper|find|startswith|endswith|replace)'"
    r"|expected string or bytes-like object, got 'list'"
    r"|the JSON object must be str, bytes or bytearray, not list"
)
"""What Python says where text is expected and there are messages."""

TOO_LONG = "it took longer than its limit of time"


@dataclass
class Outcome:
    """What one function gave in a call.

    Attributes:
        values: a number or None for each completion; empty where the call failed.
        causes: why a completion has no reward, by its number, where that is a failure.
        failure: why the call failed.
        ended: it ended its process, or was ended with it.
        metrics, extra: what it logged.
        seconds: that it took.
    """

    values: list[float | None] = field(default_factory=list)
    causes: dict[int, str] = field(default_factory=dict)
    failure: str = ""
    ended: bool = False
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> bytes:
        """As JSON; what it cannot say of what was logged, as text."""
        return json.dumps(asdict(self), default=str).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Outcome:
        """The outcome that was written by `to_json`."""
        read = json.loads(text)
        read["causes"] = {int(i): cause for i, cause in read["causes"].items()}
        return cls(**read)


@dataclass
class _Running:
    function: Callable[..., Any]
    size: int
    log: RewardLog = field(default_factory=RewardLog)
    begun: float = field(default_factory=time.perf_counter)
    ended: float | None = None

    async def awaited(self, awaitable: Awaitable[Any]) -> Any:
        try:
            return await awaitable
        finally:
            self.ended = time.perf_counter()

    def returned(self, value: Any) -> Outcome:
        try:
            values, causes = read_rewards(value, self.size)
        except RewardFailedError as error:
            return Outcome(failure=str(error), seconds=self.seconds)
        except Exception as error:  # a generator runs only now
            return self.raised(error)
        log = self.log
        extra = {name: given for name, given in log.extra.items() if len(given) == self.size}
        return Outcome(values, causes, metrics=log.metrics, extra=extra, seconds=self.seconds)

    def raised(self, error: BaseException) -> Outcome:
        return Outcome(failure=described(error), seconds=self.seconds)

    @property
    def seconds(self) -> float:
        return (self.ended or time.perf_counter()) - self.begun


def called(
    functions: Sequence[Callable[..., Any]],
    call: RewardCall,
    begin: Callable[[int], None],
    together: Callable[[Sequence[Awaitable[Any]]], list[Any]],
    passes: tuple[type[BaseException], ...] = (),
) -> Iterator[tuple[int, Outcome]]:
    """Calls each function; yields its number and what it gave, those of async ones at the end.

    Args:
        begin: told the number of the function that is called next, and -1 before the async ones.
        together: awaits all of these; gives what each returned, or raised.
        passes: exceptions that are no failures of a function, and go on.
    """
    waiting: list[tuple[int, _Running, Awaitable[Any]]] = []
    for i, function in enumerate(functions):
        begin(i)
        running = _Running(function, len(call))
        try:
            value = function(**keyword_arguments(function, call, running.log))
        except passes:
            raise
        except BaseException as error:  # sys.exit too
            yield i, running.raised(error)
            continue
        if inspect.isawaitable(value):
            waiting.append((i, running, value))
        else:
            yield i, running.returned(value)
    if not waiting:
        return
    begin(-1)
    results = together([running.awaited(awaitable) for _, running, awaitable in waiting])
    for (i, running, _), result in zip(waiting, results, strict=True):
        failed = isinstance(result, BaseException)
        yield i, running.raised(result) if failed else running.returned(result)


def described(error: BaseException) -> str:
    """What an error of a user's code says, and where it was raised: on one line."""
    if isinstance(error, SystemExit):
        said = f"it called exit({error.code!r})"
    elif isinstance(error, TimeLimitError) or (isinstance(error, TimeoutError) and not error.args):
        said = TOO_LONG
    else:
        said = f"it raised {type(error).__name__}: {first_line(error)}"
        if first_line(error) == type(error).__name__:
            said = f"it raised {type(error).__name__}"
    return one_line(said + _place(error) + _cure(error))


def _cure(error: BaseException) -> str:
    """What to do where a function takes completions of the other form."""
    said = first_line(error)
    if isinstance(error, TypeError) and said.startswith("string indices must be integers"):
        return (
            ": if it reads completion[0]['content'], note that completions are texts here, as "
            "prompts are no messages: read the text, or write prompts as messages"
        )
    if _OF_LIST.search(said):
        return (
            ": if it reads a completion as text, note that it is a list of messages here, as "
            "prompts are messages: read completion[0]['content']"
        )
    return ""


def _place(error: BaseException) -> str:
    """The last line of a user's code on the way to the error."""
    places = sysconfig.get_paths()
    libraries = (str(Path(__file__).parent), places["stdlib"], places["purelib"], "<")
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(libraries)]
    if not theirs:
        return ""
    return f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})"
