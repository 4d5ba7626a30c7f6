"""A process that matches regular expressions with Python's engine, and is ended when it takes long.

It starts with the first expression that needs it, and ends with this process. Which expressions
those are is `patterns.py`'s to say.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from typing import Any

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
_SECONDS_TO_START = 30.0


class PatternProcess:
    """The process, started when it is first asked and again after it was ended."""

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
