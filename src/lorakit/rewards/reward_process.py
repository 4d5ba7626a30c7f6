"""A process that runs reward functions (`reward_worker.py`), seen from the one that asks it.

It is started again after a function took too long or ended it, so that neither hangs nor ends the
run. It leads a process group of its own: what functions start ends with it, and Ctrl-C reaches it
through the one that asks alone.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

from lorakit.data.template_worker import read_exactly, write_frame
from lorakit.errors import InputError, LorakitError, one_line
from lorakit.rewards.calling import TOO_LONG, Outcome
from lorakit.rewards.reward_arguments import RewardCall
from lorakit.rewards.reward_worker import SPARE_SECONDS, Request, Setup

SECONDS_TO_LOAD = 600.0
"""How long a file may take to import; it may load a model."""
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from lorakit.rewards.reward_worker import main; main()"
)
_GRACE = 2 * SPARE_SECONDS  # seconds after which a process that has not ended itself is ended


class _EndedError(Exception):
    """The process has ended; why is in the message."""


class RewardProcess:
    """The functions of one file or module, or built-in ones.

    Args:
        kind, source, functions, everything: as in `reward_worker.Setup`.

    Attributes:
        required: of each function the parameters that it needs.
        files: SHA-256 of the file and of its own imports from the same folder, by path.
        found: the names of all reward functions of the source, where `everything` is asked.
    """

    def __init__(
        self,
        kind: str,
        source: str,
        functions: Sequence[tuple[str, dict[str, Any]]],
        everything: bool = False,
    ) -> None:
        self.kind, self.source = kind, source
        self._functions, self._everything = tuple(functions), everything
        self._process: subprocess.Popen[bytes] | None = None
        self._end_at_exit: Any = None
        self._closed = False
        handle, name = tempfile.mkstemp(prefix="lorakit-rewards-", suffix=".txt")
        os.close(handle)
        self._trace = Path(name)
        self._forget = weakref.finalize(self, self._trace.unlink, missing_ok=True)
        try:
            facts = self._start()
        except BaseException:
            self.close()
            raise
        self.required: list[list[str]] = facts["required"]
        self.files: dict[str, str] = facts["files"]
        self.found: list[str] = facts["found"]

    def ask(
        self, which: Sequence[int], call: RewardCall, seconds: float | None
    ) -> dict[int, Outcome]:
        """What each of the functions, by its number, gives.

        Args:
            seconds: that each may take; None for no limit.

        Raises:
            InputError: a column's values cannot be sent to another process.
            LorakitError: the process cannot be started again.
        """
        outcomes: dict[int, Outcome] = {}
        while rest := [i for i in which if i not in outcomes]:
            if self._closed:
                raise LorakitError("the rewards are closed")
            if not self._alive():
                self._start()
            try:
                request = pickle.dumps(Request(tuple(rest), call, seconds))
            except Exception as error:
                raise InputError(
                    f"rewards: the columns of the rows cannot be given to another process: {error}"
                ) from error
            running: list[int] = []
            try:
                self._talk(request, seconds, outcomes, running)
            except _EndedError as error:
                blamed = running if running != [-1] else rest
                for i in blamed or rest:
                    outcomes.setdefault(i, Outcome(failure=str(error), ended=True))
        return outcomes

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._closed = True
        self._end()
        self._forget()

    def _start(self) -> dict[str, Any]:
        """Starts the process; what it says of its functions.

        Raises:
            InputError: the functions cannot be loaded.
            LorakitError: it cannot be started.
        """
        self._trace.write_text("", encoding="utf-8")
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise LorakitError(
                f"the process of reward functions cannot be started: {error}"
            ) from error
        self._process = process
        self._end_at_exit = weakref.finalize(self, _end, process)
        trace = str(self._trace)
        setup = Setup(self.kind, self.source, self._functions, trace, self._everything)
        try:
            self._send(pickle.dumps(setup))
            facts: dict[str, Any] = json.loads(self._receive(SECONDS_TO_LOAD))
        except _EndedError as error:
            self._end()
            raise InputError(f"rewards: {self._shown}: while it was imported, {error}") from error
        except BaseException:
            self._end()
            raise
        if "error" in facts:
            self._end()
            raise InputError(f"rewards: {self._shown}: {facts['error']}")
        return facts

    def _talk(
        self,
        request: bytes,
        seconds: float | None,
        outcomes: dict[int, Outcome],
        running: list[int],
    ) -> None:
        """Sends a request and reads the replies into `outcomes`; `running` is what has begun."""
        limit = None if seconds is None else seconds + _GRACE
        try:
            self._send(request)
            while True:
                head, _, body = self._receive(limit).partition(b"\n")
                said = json.loads(head)
                if "begins" in said:
                    running[:] = [said["begins"]]
                elif "gave" in said:
                    outcomes[said["gave"]] = Outcome.from_json(body)
                else:
                    return
        except _EndedError:
            raise
        except BaseException:  # Ctrl-C: replies are still to come
            self._end()
            raise

    def _send(self, frame: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            write_frame(self._process.stdin, frame)
        except (OSError, ValueError) as error:
            raise self._ended(None) from error

    def _receive(self, seconds: float | None) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        late: list[bool] = []

        def expire() -> None:
            late.append(True)
            _end(process)

        timer = None if seconds is None else Timer(seconds, expire)
        if timer:
            timer.daemon = True
            timer.start()
        try:
            frame = read_exactly(process.stdout)
        except (OSError, ValueError) as error:
            raise self._ended(seconds if late else None) from error
        finally:
            if timer:
                timer.cancel()
        if frame is None:
            raise self._ended(seconds if late else None)
        return frame

    def _ended(self, after: float | None) -> _EndedError:
        """Why the process has ended; it is ended with those that it has started."""
        process = self._process
        if process is None:  # closed by another thread
            return _EndedError("the rewards are closed")
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        code = process.returncode
        self._end()
        trace = self._trace.read_text(encoding="utf-8", errors="replace")
        where = _line_in(trace)
        if after is not None or "Timeout (" in trace:
            return _EndedError(f"{TOO_LONG}{where}")
        if code is None:
            return _EndedError("its process closed its streams")
        if code < 0:
            name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
            why = ": it may have run out of memory" if -code == signal.SIGKILL else ""
            return _EndedError(f"its process was ended by {name}{where}{why}")
        return _EndedError(f"it ended its process with exit code {code}{where}")

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _end(self) -> None:
        if self._end_at_exit is not None:
            self._end_at_exit()
        self._process = None

    @property
    def _shown(self) -> str:
        return "built-in" if self.kind == "builtin" else self.source


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started."""
    with suppress(OSError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.close()
    process.wait()


def _line_in(trace: str) -> str:
    """The innermost line of a user's code in a trace of faulthandler's."""
    own = str(Path(__file__).parent)
    library = (own, str(Path(os.__file__).parent))
    for file, line, name in re.findall(r'File "([^"]+)", line (\d+) in (\S+)', trace):
        if not file.startswith(library):
            return one_line(f" ({Path(file).name}, line {line}, in {name})")
    return ""
