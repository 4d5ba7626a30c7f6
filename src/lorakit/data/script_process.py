"""A script in a process of its own that is asked, one request at a time, with a limit of time.

It runs with `python -I` and imports the packages that it needs and nothing else, so that it starts
in a tenth of a second and can limit its memory. What requests and replies look like is the
script's matter.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import IO

from lorakit.errors import LorakitError

_SECONDS_TO_START = 60.0


class ScriptProcess:
    """One process of a script. It is used by one thread at a time.

    Args:
        script: the file; it sends a first reply when it has started.
        packages: what it imports; the folders that these lie in are its arguments.
        task: what the process does, for error messages.
        read: takes one reply off a pipe; None if the pipe ends before the reply does.

    Raises:
        LorakitError: it does not start.
    """

    def __init__(
        self,
        script: str | Path,
        packages: Iterable[str],
        task: str,
        read: Callable[[IO[bytes]], bytes | None],
    ) -> None:
        places = {
            str(Path(found.origin).parent.parent)
            for name in packages
            if (found := importlib.util.find_spec(name)) is not None and found.origin
        }
        self._read, self._late = read, False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(script), *sorted(places)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self.ask(lambda _: None, _SECONDS_TO_START)
        except (OSError, EOFError) as error:
            raise LorakitError(f"the process that {task} did not start: {error}") from error

    def ask(self, send: Callable[[IO[bytes]], object], seconds: float) -> bytes:
        """The reply to the request that `send` writes into a pipe.

        Raises:
            TimeoutError: the reply does not come within `seconds`. The process has ended then.
            EOFError: the process ended, as it does when its memory is full.
        """
        inward, outward = self._process.stdin, self._process.stdout
        assert inward is not None
        assert outward is not None
        limit = Timer(seconds, self._expire)
        limit.daemon = True
        limit.start()
        reply = None
        try:
            send(inward)
            inward.flush()
            reply = self._read(outward)
        except OSError:  # it ended while it was written to
            pass
        finally:
            limit.cancel()
            if reply is None:  # also behind Ctrl-C: a reply that comes later is another request's
                self.end()
        if reply is None:
            raise TimeoutError("it took too long") if self._late else EOFError("it ended")
        return reply

    def alive(self) -> bool:
        """Whether the process can be asked."""
        return self._process.poll() is None

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        self._process.wait()

    def _expire(self) -> None:
        self._late = True
        self._process.kill()  # so that who waits for the reply goes on
