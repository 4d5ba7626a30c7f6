"""Environments in processes of their own, seen from the run: one is opened for each conversation.

A request that is not answered in time ends its process, and only that one. The other side is
`environment_worker.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lorakit.data.template_worker import read_exactly, write_frame
from lorakit.errors import InputError, LorakitError
from lorakit.rl.environment_worker import FORK

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from lorakit.rl.environment_worker import run; run(sys.argv.pop())"
)
_SECONDS_TO_START = 600.0
_GRACE = 2.0
"""Seconds that a call may take beyond its limit before its process is ended."""


class EnvironmentFailedError(Exception):
    """The environment of one conversation raised, hung or is gone; the message says what."""


class EnvironmentProcess:
    """A user's environment class, and tools beside it, ready for conversations.

    Args:
        spec: `FILE.py:CLASS` or `MODULE:CLASS`; None for tools alone.
        functions: tools, each as `FILE.py:FUNCTION` or `MODULE:FUNCTION`.
        settings: arguments of the class.
        seconds: how long one call may take.

    Attributes:
        steps: the environment has a method `step`, and its messages are what answers the model.
        rewards: it has a method `get_reward`.
        tools: the functions that the model is shown, as `{type: function, function: {...}}`.
        files: SHA-256 of the user's files and of their own imports from the same folders, by name.

    Raises:
        InputError: it cannot be imported, or is no environment.
        LorakitError: its process cannot be started.
    """

    def __init__(
        self,
        spec: str | None,
        functions: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        seconds: float = 30.0,
    ) -> None:
        if not hasattr(os, "fork"):
            raise InputError("environments and tools need a system that can fork (Linux, macOS)")
        self._name = spec or ", ".join(functions)
        self._seconds = seconds
        self._control, theirs = socket.socketpair()
        with theirs:
            number = str(theirs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, number, json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _ended, self._process, self._control)
        try:
            found = self._started(pickle.dumps((spec, list(functions), dict(settings or {}))))
        except BaseException:
            self.close()
            raise
        self.steps, self.rewards = bool(found["steps"]), bool(found["rewards"])
        self.tools: tuple[dict[str, Any], ...] = tuple(found["tools"])
        self.files: dict[str, str] = found["files"]

    def _started(self, request: bytes) -> dict[str, Any]:
        self._control.settimeout(_SECONDS_TO_START)
        stream: Any = self._control.makefile("rwb")
        try:
            write_frame(stream, request)
            reply = read_exactly(stream)
        except TimeoutError as error:
            raise InputError(
                f"{self._name}: importing it takes longer than {_SECONDS_TO_START:g} s"
            ) from error
        except OSError as error:
            raise self._gone() from error
        if reply is None:
            raise self._gone()
        found: dict[str, Any] = json.loads(reply)
        if "error" in found:
            raise InputError(f"{self._name}: {found['error']}")
        return found

    def _gone(self) -> LorakitError:
        return LorakitError(f"{self._name}: the process that imports it ended by itself")

    def open(self, seed: int) -> RemoteEnvironment:
        """A new environment in a process of its own.

        Args:
            seed: of its random numbers.

        Raises:
            LorakitError: no process can be started.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [FORK], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise self._gone() from error
        return RemoteEnvironment(ours, seed, self._seconds)

    def close(self) -> None:
        """Ends the process, and those of all conversations."""
        self._end()


def _ended(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class RemoteEnvironment:
    """The environment of one conversation: it is asked something, and answers later."""

    def __init__(self, own: socket.socket, seed: int, seconds: float) -> None:
        self._socket, self._seconds = own, seconds
        self._stream: Any = own.makefile("rwb")
        self._first: list[Any] = [seed]
        self._pid: int | None = None
        self._until = 0.0
        self._waiting = False

    def ask(self, what: str, *arguments: Any) -> None:
        """Sends a request: a method of `environment_class.Environment`, and what it is given.

        The first one is `reset`. Each is answered before the next.

        Raises:
            EnvironmentFailedError: the process is gone.
        """
        given, self._first = [*self._first, *arguments], []
        self._until, self._waiting = time.monotonic() + self._seconds + _GRACE, True
        try:
            write_frame(self._stream, pickle.dumps((what, given, self._seconds)))
        except OSError as error:
            raise EnvironmentFailedError("its process ended by itself") from error

    def answer(self) -> Any:
        """What the last request gave; waits for it.

        Raises:
            EnvironmentFailedError: it raised, took too long, or the process is gone.
        """
        reply = self._reply()
        if "error" in reply:
            raise EnvironmentFailedError(reply["error"])
        return reply["value"]

    def _reply(self) -> dict[str, Any]:
        try:
            if self._pid is None:
                self._pid = int(self._frame())
            reply: dict[str, Any] = json.loads(self._frame())
        except TimeoutError as error:
            self.close()
            raise EnvironmentFailedError(
                f"it took longer than {self._seconds:g} s, and its process was ended"
            ) from error
        except (OSError, ValueError) as error:
            raise EnvironmentFailedError("its process ended by itself") from error
        self._waiting = False
        return reply

    def _frame(self) -> bytes:
        self._socket.settimeout(max(0.01, self._until - time.monotonic()))
        found = read_exactly(self._stream)
        if found is None:
            raise ValueError("closed")
        return found

    def let_go(self) -> None:
        """Has it close what it has open, and lets go of it: its process ends by itself."""
        with suppress(OSError):
            write_frame(self._stream, pickle.dumps(("close", [], self._seconds)))
        self.close()

    def close(self) -> None:
        """Ends it; its process is ended where it has not answered."""
        if self._waiting and self._pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        with suppress(OSError):
            self._stream.close()
        self._socket.close()
