"""A limit of time for Python code that this process runs itself.

Meant for programs that came from elsewhere and are run too often to have a process of their own.
What computes in C without returning to Python is not interrupted before it does.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_POLL = 0.25


class TimeLimitError(Exception):
    """The time is over."""


class _Limit:
    """Code that runs now, and until when it may."""

    def __init__(self, seconds: float) -> None:
        self.thread = threading.get_ident()
        self.end = time.monotonic() + seconds
        self.fired = False


class _Watch:
    """One thread that interrupts what takes too long."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.running: set[_Limit] = set()
        threading.Thread(target=self._watch, name="lorakit-time-limit", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL)
            now = time.monotonic()
            with self.lock:
                for limit in self.running:
                    if limit.end < now and not limit.fired:
                        limit.fired = True
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(limit.thread), ctypes.py_object(TimeLimitError)
                        )


_making = threading.Lock()
_the_watch: _Watch | None = None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimitError in the code within, once it takes longer. It costs microseconds."""
    watch, limit = _watch(), _Limit(seconds)
    with watch.lock:
        watch.running.add(limit)
    try:
        yield
    finally:
        with watch.lock:
            watch.running.discard(limit)
        if limit.fired and not isinstance(sys.exception(), TimeLimitError):
            time.sleep(0.1)  # it is raised here at the latest, and not in what comes after


def _watch() -> _Watch:
    global _the_watch
    if _the_watch is None or _the_watch.process != os.getpid():
        with _making:
            if _the_watch is None or _the_watch.process != os.getpid():
                _the_watch = _Watch()
    return _the_watch
