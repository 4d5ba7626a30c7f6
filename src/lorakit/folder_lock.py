"""Locks that keep two processes from writing the same output at the same time.

The lock is the operating system's (`filelock`), so it ends with the process that holds it, however
that ends, and a copy of a locked folder is not locked. The lock file says who holds it. It is
removed when the lock is released; one that a killed process has left means nothing.
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lorakit.atomic import require_free
from lorakit.errors import InputError, LorakitError

LOCK_NAME = ".lorakit.lock"
"""The lock file inside an output folder that is written step by step, such as a run's."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_LONGEST_COMMAND = 200
_AT = 1  # Windows locks the first byte, which then cannot be read

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def locked_folder(
    folder: str | Path, check: Callable[[], object], say: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Holds the lock of an output folder, which is made if it is missing.

    A folder that was made for the lock and is still empty at the end is removed again.

    Args:
        check: raises InputError where the folder cannot be used; called before anything is
            written there, and again under the lock, when no other process can change its state.
        say: shows a line to the user.

    Raises:
        InputError: another process holds it; the message says which.
        LorakitError: the folder cannot be written.
    """
    folder = Path(folder)
    require_unlocked(folder)
    check()
    with _folders_made(folder), _locked(folder / LOCK_NAME, folder, say):
        check()
        yield


def require_unlocked(folder: str | Path) -> None:
    """Raises InputError where another process holds the lock of the output folder `folder`."""
    path = Path(folder) / LOCK_NAME
    if path.is_file() and not _is_ours(path):
        with _locked(path, Path(folder), lambda line: None, leave=True):
            pass


def reserves(argument: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorates a function that writes a new file or folder, whose path is its `argument`.

    While it runs no other process can begin to write the same path; one that exists already, and
    is no empty folder, is refused before anything is done.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def reserving(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            output = Path(signature.bind(*args, **kwargs).arguments[argument])
            require_free(output)
            parent = output.absolute().parent
            lock = parent / f".{output.name}{LOCK_NAME}"
            with _folders_made(parent), _locked(lock, output, lambda line: None):
                require_free(output)
                return function(*args, **kwargs)

        return reserving

    return decorate


@contextmanager
def _folders_made(folder: Path) -> Iterator[None]:
    """Makes `folder` and its parents; those that it made and that stay empty are removed again."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LorakitError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            for made in missing:
                made.rmdir()


@contextmanager
def _locked(
    path: Path, output: Path, say: Callable[[str], None], *, leave: bool = False
) -> Iterator[None]:
    """Holds the lock file `path`, which guards `output`; `leave` keeps the file as it is."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{output} is being written by {_holder(path)}: wait for its end, stop it, or give "
            "another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, OSError) and number not in _NO_LOCKS:
            raise LorakitError(f"cannot write {output}: {error.strerror or error}") from error
        say(
            f"the file system of {output} has no locks: make sure that no other process writes "
            "into it"
        )
        yield
        return
    try:
        if not leave:
            _write_holder(path)
        yield
    finally:
        if not leave:
            with suppress(OSError):  # Windows removes no open file
                path.unlink()
        lock.release()


def _write_holder(path: Path) -> None:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:_LONGEST_COMMAND]
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
    }
    with suppress(OSError), path.open("r+b") as file:  # a full disk is found by what is written
        file.seek(_AT)
        file.write(json.dumps(holder).encode())
        file.truncate()


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(_AT)
            holder = json.loads(file.read(10_000))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_ours(path: Path) -> bool:
    holder = _read_holder(path)
    return (holder.get("pid"), holder.get("host")) == (os.getpid(), socket.gethostname())


def _holder(path: Path) -> str:
    """Who holds the lock, as its file says."""
    try:
        return "process {pid} on {host} since {since} ({command})".format(**_read_holder(path))
    except KeyError:
        return "another process"
