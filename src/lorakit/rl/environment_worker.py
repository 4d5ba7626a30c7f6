"""The process of a user's environments: it imports their file, and forks for each conversation.

It is started by `environment_process.py` and spoken to over sockets. A conversation has a process
of its own, so that one that hangs, exits or fills the memory takes no other with it; all of them
are one process group, which ends when the run does. Frames go both ways, each with its length
before it: requests are pickles, replies JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import socket
import sys
import time
from functools import partial
from typing import Any, NoReturn

from lorakit.data.template_worker import read_exactly, write_frame
from lorakit.errors import LorakitError
from lorakit.rl.environment_class import Environment, EnvironmentClass, described, load

_SECONDS_TO_CLOSE = 2.0

FORK = b"f"
"""Asks for a process; the socket that it serves comes with it."""


class CallTimeoutError(TimeoutError):
    """A call of the user's code takes longer than it may."""


def main(control: socket.socket) -> None:
    """Reads which environment it is, describes it, and forks as often as it is asked."""
    os.dup2(2, 1)  # what the user's code prints
    stream: Any = control.makefile("rwb")
    request = read_exactly(stream)
    if request is None:
        return
    spec, functions, settings = pickle.loads(request)
    random.seed(0)  # what a file draws when it is imported is the same in a run that resumes
    try:
        factory = None if spec is None else partial(load(spec), **settings)
        found = EnvironmentClass(factory, [load(function) for function in functions])
    except LorakitError as error:
        write_frame(stream, json.dumps({"error": str(error)}).encode())
        return
    write_frame(stream, json.dumps(found.description()).encode())
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            _end()
        if os.fork() == 0:
            os.close(control.detach())
            _serve(socket.socket(fileno=fds[0]), found)
        os.close(fds[0])
        _reap()


def _reap() -> bool:
    """Whether no conversation is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def _end() -> NoReturn:
    """Ends this process and all conversations, those that close something a little later."""
    until = time.monotonic() + _SECONDS_TO_CLOSE
    while not _reap() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(0, signal.SIGKILL)
    raise AssertionError


def _serve(own: socket.socket, kind: EnvironmentClass) -> NoReturn:
    """Serves one conversation, and ends with it."""
    try:
        stream: Any = own.makefile("rwb")
        write_frame(stream, json.dumps(os.getpid()).encode())
        environment: Environment | None = None
        while (request := read_exactly(stream)) is not None:
            name, arguments, seconds = pickle.loads(request)
            try:
                with _limited(seconds):
                    if environment is None:
                        environment = kind.made(arguments.pop(0))
                    value = getattr(environment, name)(*arguments)
                reply = {"value": value}
            except BaseException as error:  # sys.exit too
                reply = {"error": described(error)}
            write_frame(stream, json.dumps(reply).encode())
    finally:
        sys.stderr.flush()
        os._exit(0)


class _limited:  # noqa: N801 (reads as a function)
    """Raises CallTimeoutError within, once it takes longer; sleeping and waiting end too.

    It is raised again after the same time: what was interrupted may go on with something else.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        def interrupt(*_: Any) -> None:
            raise CallTimeoutError(f"it took longer than {self._seconds:g} s")

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, self._seconds, self._seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(number: str) -> None:
    """Runs `main` on the socket with this descriptor."""
    main(socket.socket(fileno=int(number)))
