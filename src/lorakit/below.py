"""Opening files below a root folder, such that no name and no link can lead out of it.

Every part of a path is opened relative to the descriptor of the folder before it, and the operating
system is never asked to follow a link: links are read here, and followed only as long as they stay
below the root. So it does not matter what is renamed or replaced by a link meanwhile. Where the
system has no such calls (Windows), what was opened is compared with what the name leads to.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from pathlib import Path, PurePath
from types import TracebackType
from typing import Self

_MOST_LINKS = 40
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(
    os, "O_NONBLOCK", 0
)  # a pipe without a writer would hold up the one who opens it
_FOLDER = getattr(os, "O_DIRECTORY", 0)


class OutsideError(PermissionError):
    """A path leads out of the root."""


class Folder:
    """An open folder, whose files are opened by name.

    Args:
        path: of the folder; with a root, relative to it or absolute.
        root: where it must lie, and everything that links in it lead to; None for no such limit,
            where links are followed wherever they lead.

    Raises:
        OutsideError: `path` leads out of the root, or to the root itself.
        OSError, ValueError: there is no such folder.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self._root = None if root is None else root.resolve(strict=True)
        self._stack: list[int] = []
        self._path = path
        if self._root is None:
            if not _has_descriptors():
                self._path = path.resolve(strict=True)
                return
            self._stack = [os.open(path, _READ | _FOLDER)]
            return
        parts = _parts_below(path, {self._root, root.absolute()} if root else set())
        if not _has_descriptors():
            self._path = (self._root / PurePath(*parts)).resolve(strict=True)
            if self._path == self._root or not self._path.is_relative_to(self._root):
                raise OutsideError(errno.EACCES, "outside the root", str(path))
            if not self._path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
            return
        self._stack = [os.open(self._root, _READ | _FOLDER | _NO_LINK)]
        try:
            self._enter(deque(parts), self._stack, folder=True)
            if len(self._stack) == 1:
                raise OutsideError(errno.EACCES, "the root itself", str(path))
        except BaseException:
            self.close()
            raise

    def open_file(self, name: str) -> int:
        """A descriptor of the regular file `name`, for reading.

        Raises:
            OutsideError: it is a link out of the root.
            OSError: there is none, or it is no regular file (a folder, a pipe, a device).
        """
        found = self._open(name)
        if not stat.S_ISREG(os.fstat(found).st_mode):
            os.close(found)
            raise OSError(errno.EINVAL, "not a regular file", name)
        return found

    def names_in(self, name: str) -> list[str]:
        """What lies in the folder `name` inside.

        Raises:
            OutsideError: it is a link out of the root.
            OSError: there is none.
        """
        if not self._stack:
            real = (self._path / name).resolve(strict=True)
            if self._root is not None and not real.is_relative_to(self._root):
                raise OutsideError(errno.EACCES, "outside the root", name)
            return [path.name for path in real.iterdir()]
        found = self._open(name, folder=True)
        try:
            return os.listdir(found)  # noqa: PTH208 (a descriptor)
        finally:
            os.close(found)

    def _open(self, name: str, folder: bool = False) -> int:
        if not self._stack:
            return self._open_and_compare(name)
        if self._root is None:
            kind = _FOLDER if folder else 0
            return os.open(name, _READ | _NO_WAIT | kind, dir_fd=self._stack[-1])
        stack = [os.dup(one) for one in self._stack]
        try:
            self._enter(deque(PurePath(name).parts), stack, folder)
            return stack.pop()
        finally:
            _close(stack)

    def _open_and_compare(self, name: str) -> int:
        found = os.open(self._path / name, _READ)
        try:
            real = (self._path / name).resolve(strict=True)
            if self._root is not None and not real.is_relative_to(self._root):
                raise OutsideError(errno.EACCES, "outside the root", name)
            if not os.path.samestat(os.fstat(found), real.stat()):
                raise OutsideError(errno.EACCES, "changed while it was opened", name)
        except BaseException:
            os.close(found)
            raise
        return found

    def _enter(self, parts: deque[str], stack: list[int], folder: bool) -> None:
        """Opens what `parts` lead to; `stack` has the descriptors from the root to there."""
        links = 0
        while parts:
            part = parts.popleft()
            if part in ("", "."):
                continue
            if part == "..":
                if len(stack) == 1:
                    raise OutsideError(errno.EACCES, "outside the root", part)
                os.close(stack.pop())
                continue
            kind = _FOLDER if parts or folder else 0
            try:
                stack.append(os.open(part, _READ | _NO_LINK | _NO_WAIT | kind, dir_fd=stack[-1]))
                continue
            except OSError as error:
                refusal = error
            try:
                target = PurePath(os.readlink(part, dir_fd=stack[-1]))
            except OSError:
                raise refusal from None  # it is no link
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, "too many links", part)
            if target.is_absolute():
                assert self._root is not None
                parts.extendleft(reversed(_parts_below(target, {self._root})))
                _close(stack[1:])
                del stack[1:]
            else:
                parts.extendleft(reversed(target.parts))

    def close(self) -> None:
        """Closes the folder; files that were opened stay open."""
        _close(self._stack)
        self._stack = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        self.close()


def _parts_below(path: PurePath, roots: set[Path]) -> tuple[str, ...]:
    """The parts of a path behind the root.

    Raises:
        OutsideError: it is absolute and begins with none of the roots.
    """
    if not path.is_absolute():
        return path.parts
    for root in roots:
        if path.is_relative_to(root):
            return path.relative_to(root).parts
    raise OutsideError(errno.EACCES, "outside the root", str(path))


def _has_descriptors() -> bool:
    return {os.open, os.readlink} <= os.supports_dir_fd and bool(_NO_LINK and _FOLDER)


def _close(descriptors: list[int]) -> None:
    for one in descriptors:
        os.close(one)
