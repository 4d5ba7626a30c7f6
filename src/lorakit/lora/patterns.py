"""Regular expressions out of adapters and recipes, matched against module paths in bounded time.

They come from files that others wrote, and Python's own engine needs exponential time for some.
A name is compared without any engine; RE2 matches in linear time what it can express; lookaround
and backreferences are matched by Python in a process with a time limit. What is matched is what
PEFT matches.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorakit.errors import InputError

_SECONDS = 5.0
_SECONDS_EACH = 1.0
_SECONDS_TO_START = 30.0
_SECONDS_FREE = 50e-6  # of an ordinary match, so that a configuration can be used for long
_RE2_BYTES = 4 << 20
_LONGEST_IN_RE2 = 20_000
_MOST_GROUPS_IN_RE2 = 500

# A name, as it is or escaped by `re.escape`; `^` may lead it.
_NAME = re.compile(r"\^?(?:[A-Za-z0-9_/. -]|\\[^A-Za-z0-9])*")
_CHARACTER = re.compile(r"\\?(?s:.)")
# Where RE2 and Python read the same text differently: `{,3}` and classes such as `[[:alpha:]]`.
_OTHERWISE_IN_RE2 = re.compile(r"\{\s*,|\[:")


@dataclass
class TimeLeft:
    """How many seconds of processor time the patterns of one configuration may still take."""

    seconds: float = _SECONDS


def check(pattern: str) -> None:
    """Raises InputError unless `pattern` is a regular expression that can be matched."""
    if _literal(pattern) is None and _linear(pattern) is None:
        _in_process(pattern, pattern, "", True)


def matches_whole(pattern: str, name: str, left: TimeLeft | None = None) -> bool:
    """`re.fullmatch(pattern, name)`: how `target_modules` and `exclude_modules` match.

    Raises:
        InputError: it is not a regular expression, or takes too long.
    """
    if (literal := _literal(pattern)) is not None:
        return literal.is_whole(name)
    return _run(pattern, pattern, name, left, whole=True) is not None


def matches_key(pattern: str, name: str, left: TimeLeft | None = None) -> bool:
    r"""`re.match(rf"(.*\.)?({pattern})$", name)`: how keys of `rank_pattern` match.

    Raises:
        InputError: it is not a regular expression, or takes too long.
    """
    if (literal := _literal(pattern)) is not None:
        return literal.is_end(name)
    return _run(rf"(.*\.)?({pattern})$", pattern, name, left) is not None


def layer_index(pattern: str, name: str, left: TimeLeft | None = None) -> int | None:
    r"""The first number behind `pattern` in `name`, as `layers_pattern` means it.

    Raises:
        InputError: it is not a regular expression, or takes too long.
    """
    expression = rf"(?:.*?\.)?(?:{pattern})\.(?P<index>\d+)\."
    found = _run(expression, pattern, name, left)
    return int(str(found["index"])) if found else None


def first_match(patterns: Iterable[str], name: str, left: TimeLeft | None = None) -> str | None:
    """The first of `patterns`, keys of `rank_pattern` or `alpha_pattern`, that means `name`.

    Raises:
        InputError: one is not a regular expression, or they take too long.
    """
    keys = tuple(patterns)
    if not keys:
        return None
    index = _index(keys)
    found = [index.whole.get(name), *(index.ends.get(ending) for ending in endings(name))]
    first = min((place for place in found if place is not None), default=len(keys))
    for place in index.others:
        if place >= first:
            break
        if matches_key(keys[place], name, left):
            return keys[place]
    return keys[first] if first < len(keys) else None


def without_match(
    patterns: Iterable[str], names: Iterable[str], left: TimeLeft | None = None
) -> list[str]:
    """Those of `patterns`, keys of `rank_pattern` or `alpha_pattern`, that mean no one of `names`.

    Raises:
        InputError: one is not a regular expression, or they take too long.
    """
    keys, paths = tuple(patterns), list(names)
    index = _index(keys)
    there = {ending for path in paths for ending in endings(path)}
    used = {place for ending, place in index.ends.items() if ending in there}
    used |= {place for path in paths if (place := index.whole.get(path)) is not None}
    used |= {
        place
        for place in index.others
        if any(matches_key(keys[place], path, left) for path in paths)
    }
    return [key for place, key in enumerate(keys) if place not in used]


def endings(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c` and `c` of the path `a.b.c`: what a name in `target_modules` may be."""
    yield name
    for place, character in enumerate(name):
        if character == ".":
            yield name[place + 1 :]


@dataclass(frozen=True)
class _Literal:
    """A pattern that is a name; `anchored` by `^`, with dots that stand for any character."""

    text: str
    anchored: bool
    dots: tuple[int, ...]

    def is_whole(self, name: str) -> bool:
        if not self.dots or len(name) != len(self.text):
            return name == self.text
        return all(
            mine == its or (place in self.dots and its != "\n")
            for place, (mine, its) in enumerate(zip(self.text, name, strict=True))
        )

    def is_end(self, name: str) -> bool:
        before = len(name) - len(self.text)
        if before <= 0 or self.anchored:
            return before == 0 and self.is_whole(name)
        return name[before - 1] == "." and self.is_whole(name[before:])


@lru_cache(maxsize=1 << 16)
def _literal(pattern: str) -> _Literal | None:
    """The name that `pattern` is; None where it is more than that."""
    if not _NAME.fullmatch(pattern):
        return None
    anchored = pattern.startswith("^")
    characters = _CHARACTER.findall(pattern[anchored:])
    dots = tuple(place for place, one in enumerate(characters) if one == ".")
    return _Literal("".join(one[-1] for one in characters), anchored, dots)


@dataclass(frozen=True)
class _Index:
    """Places of patterns: of names by the path or its end that they mean, and of all others."""

    whole: dict[str, int]
    ends: dict[str, int]
    others: list[int]


@lru_cache(maxsize=8)
def _index(patterns: tuple[str, ...]) -> _Index:
    index = _Index({}, {}, [])
    for place, pattern in enumerate(patterns):
        literal = _literal(pattern)
        if literal is None or literal.dots:
            index.others.append(place)
        else:
            (index.whole if literal.anchored else index.ends).setdefault(literal.text, place)
    return index


def _run(
    expression: str, pattern: str, name: str, left: TimeLeft | None, whole: bool = False
) -> Mapping[str, str | None] | None:
    """The groups of `expression`, made of `pattern`, at the start of `name`, or in all of it.

    Returns: None where it does not match.
    """
    left = left or TimeLeft()
    began = time.thread_time()
    linear = _linear(expression) if name.isascii() and name.isprintable() else None
    if linear is not None:
        found = linear.fullmatch(name) if whole else linear.match(name)
        groups = None if found is None else found.groupdict()
        seconds = time.thread_time() - began
    else:
        groups, seconds = _in_process(expression, pattern, name, whole)
    left.seconds -= max(0.0, seconds - _SECONDS_FREE)
    if left.seconds <= 0:
        raise _too_slow(pattern)
    return groups


@lru_cache(maxsize=1024)
def _linear(expression: str) -> Any:
    """`expression` for RE2; None where it is more than RE2 can do, or too large for it."""
    if len(expression) > _LONGEST_IN_RE2 or expression.count("(") > _MOST_GROUPS_IN_RE2:
        return None
    if _OTHERWISE_IN_RE2.search(expression):
        return None
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _RE2_BYTES
    try:
        return re2.compile(expression, options)
    except re2.error:  # lookaround, a backreference, or no expression at all
        return None


@lru_cache(maxsize=1 << 16)
def _in_process(
    expression: str, pattern: str, name: str, whole: bool
) -> tuple[Mapping[str, str | None] | None, float]:
    """The groups that Python's engine finds, and the seconds that it took."""
    try:
        answer = MATCHER.ask([expression, name, whole], _SECONDS_EACH)
    except TimeoutError as error:
        raise _too_slow(pattern) from error
    if "error" in answer:
        raise InputError(f"{_shown(pattern)} is not a regular expression: {answer['error']}")
    return answer["groups"], answer["seconds"]


def _too_slow(pattern: str) -> InputError:
    return InputError(
        f"the pattern {_shown(pattern)} takes too long to match: write it without nested "
        "repetitions, or name the modules"
    )


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:80]}…")


# A process of its own, ended when it takes long.
_PROGRAM = """
import json, re, sys, time, warnings
warnings.simplefilter("ignore")
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):
    pass
try:
    from signal import alarm
except ImportError:
    def alarm(seconds): pass
print("{}", flush=True)
for line in sys.stdin:
    (expression, name, whole), limit = json.loads(line)
    alarm(int(limit) + 2)  # where nobody is left who would end this process
    began = time.process_time()
    try:
        compiled = re.compile(expression)
        found = (compiled.fullmatch if whole else compiled.match)(name)
        answer = {"groups": found and found.groupdict()}
    except (re.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        answer = {"error": str(error) or type(error).__name__}
    answer["seconds"] = time.process_time() - began
    alarm(0)
    print(json.dumps(answer), flush=True)
"""


class PatternProcess:
    """A process with Python's engine, started when first asked and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.end)

    def ask(self, question: list[Any], seconds: float) -> dict[str, Any]:
        """`{groups, seconds}` or `{error}` for [expression, name, whether all of it must match].

        Raises:
            TimeoutError: there is no answer after so many seconds, or memory was too small for it.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-X", "utf8", "-c", _PROGRAM],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    encoding="utf-8",
                )
                self._answer(self._process, _SECONDS_TO_START)
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps([question, seconds]) + "\n")
                self._process.stdin.flush()
            except OSError as error:
                self._kill()
                raise TimeoutError("the process ended") from error
            return self._answer(self._process, seconds)

    def end(self) -> None:
        """Ends the process, if there is one."""
        with self._lock:
            self._kill()

    def _answer(self, process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
        # A timer works for pipes on every system, as select does not.
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            self._kill()
            raise TimeoutError(f"no answer in {seconds:g} seconds")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes the pipes and waits
                pass
            self._process = None


MATCHER = PatternProcess()
