"""Writing so that a kill at any moment leaves the old or the new, never half.

Everything is written to a temporary sibling, flushed to the disk, and renamed into place.
"""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import InputError, LorakitError

_WINDOWS = os.name == "nt"


def write_file(path: str | Path, content: bytes | str) -> None:
    """Replaces the file at `path` with `content` in one step. Text is written as UTF-8.

    Lone surrogates, as paths have them whose bytes are not UTF-8, become `\\udc80`: JSON's escape,
    which reads back as the same path.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    with replacing_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes `path`'s place.

    Raises:
        LorakitError: if the disk is full or the place cannot be written.
    """
    path = Path(path)
    with _named_failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            temporary.chmod(0o666 & ~_umask())
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; when the block succeeds it becomes `path`.

    What a process that was killed while writing the same `path` has left is removed.

    Raises:
        InputError: if `path` exists and is not an empty folder.
        LorakitError: if the disk is full or the place cannot be written.
    """
    path = Path(path)
    require_free(path)
    with _named_failures(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        lock = _lock(temporary)
        try:
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o666 & ~_umask())  # safetensors makes its files private
                    _sync(file)
            _sync(temporary)
            if _WINDOWS and path.is_dir():
                path.rmdir()  # there an empty folder is not replaced
            temporary.replace(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _remove_left_over(path: Path) -> None:
    """Removes temporary folders for `path` whose process is gone, and with it its lock."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if folder.is_dir() and (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Locks a folder for as long as the returned handle is open; None where that cannot be."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def require_free(path: str | Path) -> None:
    """Raises InputError unless `path` does not exist yet or is an empty folder."""
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} already exists: give another output folder, or remove it first")


@contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals into one line that names the place."""
    try:
        yield
    except OSError as error:
        raise LorakitError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        # safetensors reports a full disk as its own error type, with the system's text inside.
        if "os error" in str(error).lower():
            raise LorakitError(f"cannot write {path}: {error}") from error
        raise


def _sync(path: Path) -> None:
    if _WINDOWS and path.is_dir():
        return  # there a folder cannot be opened
    handle = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
