"""The process that runs the reward functions of a user's file, or the built-in ones.

`reward_process.py` starts it, asks it, and ends it when it must. Requests come by standard input
as pickles, replies go as JSON, both in frames with their length before them. What functions print
goes to standard error. A function that takes too long ends this process, from a thread of C that
needs no turn of the interpreter and writes down where the function was.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lorakit.data.template_worker import read_exactly, write_frame
from lorakit.errors import InputError
from lorakit.rewards.builtin import built_in
from lorakit.rewards.calling import called
from lorakit.rewards.load_rewards import (
    RewardLoadError,
    find_function,
    hashes,
    load_file,
    load_module,
    reward_functions,
)
from lorakit.rewards.reward_arguments import RewardCall, parameters

SPARE_SECONDS = 2.0
"""How much longer than its limit a function may take that must be ended with the process."""
_LOOKS_FOR_PARENT = 1.0  # seconds


@dataclass(frozen=True)
class Setup:
    """What a worker loads.

    Attributes:
        kind, source: as in `RewardSpec`.
        functions: pairs of a name and settings; of built-in ones the name is the kind of reward.
        trace: the file for a trace of a function that is ended, or that crashes.
        everything: also list all reward functions of the source.
    """

    kind: str
    source: str
    functions: tuple[tuple[str, dict[str, Any]], ...]
    trace: str
    everything: bool = False


@dataclass(frozen=True)
class Request:
    """A call of some of the functions, by their numbers, each within so many seconds."""

    which: tuple[int, ...]
    call: RewardCall
    seconds: float | None


def main() -> None:
    """Loads what the first frame says and answers the other ones, until the last."""
    inward, outward = _own_streams()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who wait for the rewards
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    first = read_exactly(inward)
    if first is None:
        return
    setup: Setup = pickle.loads(first)
    with Path(setup.trace).open("w", encoding="utf-8") as trace:
        faulthandler.enable(trace)
        try:
            functions, facts = _load(setup)
        except (RewardLoadError, InputError) as error:
            _send(outward, {"error": str(error)})
            return
        _send(outward, facts)
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        while (frame := read_exactly(inward)) is not None:
            _answer(pickle.loads(frame), functions, loop, outward, trace)


def _load(setup: Setup) -> tuple[list[Callable[..., Any]], dict[str, Any]]:
    """The functions, and what is to be known of them."""
    found: list[str] = []
    files: dict[str, str] = {}
    if setup.kind == "builtin":
        functions = [built_in(name, settings) for name, settings in setup.functions]
    else:
        module = (load_file if setup.kind == "file" else load_module)(setup.source)
        found = reward_functions(module) if setup.everything else []
        wanted = setup.functions or tuple((name, {}) for name in found)
        functions = [find_function(module, name, settings) for name, settings in wanted]
        files = hashes(module)
    takes = [parameters(function) for function in functions]
    required = [[name for name, needed in names.items() if needed] for names, _ in takes]
    return functions, {"required": required, "files": files, "found": found}


def _answer(
    request: Request,
    functions: Sequence[Callable[..., Any]],
    loop: asyncio.AbstractEventLoop,
    outward: IO[bytes],
    trace: IO[str],
) -> None:
    """Sends the number of each function when it begins, and what it gave."""
    seconds = request.seconds

    def begin(position: int) -> None:
        _send(outward, {"begins": request.which[position] if position >= 0 else -1})
        if seconds is not None:
            limit = seconds + (0 if position >= 0 else SPARE_SECONDS)
            faulthandler.dump_traceback_later(limit, exit=True, file=trace)

    def together(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
        async def all_of_them() -> list[Any]:
            limited = [asyncio.wait_for(one, seconds) for one in awaitables]
            return await asyncio.gather(*limited, return_exceptions=True)

        return loop.run_until_complete(all_of_them())

    chosen = [functions[i] for i in request.which]
    for position, outcome in called(chosen, request.call, begin, together):
        faulthandler.cancel_dump_traceback_later()
        head = json.dumps({"gave": request.which[position]}).encode()
        write_frame(outward, head + b"\n", outcome.to_json())
    _send(outward, {"done": True})


def _send(outward: IO[bytes], facts: dict[str, Any]) -> None:
    write_frame(outward, json.dumps(facts).encode())


def _own_streams() -> tuple[IO[bytes], IO[bytes]]:
    """The streams of the requests and replies, which functions cannot reach by print or input."""
    inward, outward = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return inward, outward


def _end_with_parent(parent: int) -> None:
    """Ends this process, and those that it has started, once its parent has ended."""
    while os.getppid() == parent:
        time.sleep(_LOOKS_FOR_PARENT)
    with contextlib.suppress(AttributeError, OSError):
        if os.getpgrp() == os.getpid():  # it leads a group of its own
            os.killpg(0, signal.SIGKILL)
    os._exit(1)
