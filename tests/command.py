"""The `lorakit` command, run as a person would: in this process, or in one of its own."""

import contextlib
import io
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from lorakit.cli.main import main

Done = subprocess.CompletedProcess[str]
Command = Callable[..., Done]


def run_lorakit(folder: Path, *arguments: str | Path, stdin: str = "") -> Done:
    """Runs the command in `folder` and in this process, without the seconds that imports take.

    Streams, environment, working directory, warnings and exit code are those of a process;
    what libraries write to the file descriptors themselves is not captured.
    """
    words = ["lorakit", *map(str, arguments)]
    code = 0
    with _as_a_process(folder, words, stdin) as (out, err):
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(words, code, _text(out), _text(err))


def run_process(folder: Path, *arguments: str | Path, stdin: str = "") -> Done:
    """Runs the command in `folder` as a process of its own; what it says is text."""
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True)


@contextlib.contextmanager
def _as_a_process(
    folder: Path, words: list[str], stdin: str
) -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(mock.patch.dict(os.environ))
        for name, value in {"argv": words, "stdin": given, "stdout": out, "stderr": err}.items():
            stack.enter_context(mock.patch.object(sys, name, value))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(mock.patch.object(warnings, "formatwarning", warnings.formatwarning))
        warnings.showwarning = _shown
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        yield out, err


def _shown(message: Warning | str, category: type[Warning], where: str, line: int, *_: object):
    sys.stderr.write(warnings.formatwarning(message, category, where, line))


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode()
