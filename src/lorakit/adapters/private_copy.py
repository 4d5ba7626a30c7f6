"""A private copy of an adapter's folder, for those who serve it.

A folder that others write to may change while it is read: a file may be cut, replaced, or belong to
the next version already. So every file is opened once, copied up to a limit of size, and checked
not to have changed while all were copied. What is served is read from the copy alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lorakit.adapters.adapter_tokenizer import TOKENIZER_FILES
from lorakit.adapters.lineage import STAGE_NAME
from lorakit.adapters.manifest import MANIFEST_NAME
from lorakit.below import Folder, OutsideError
from lorakit.errors import InputError, LorakitError
from lorakit.lora.locate import CONFIG_NAME, INITIAL_NAME, WEIGHTS_NAME
from lorakit.models.template_files import ADDITIONAL, PROCESSOR_NAME, TEMPLATE_NAME

_MB = 1 << 20
_PICKLE = "adapter_model.bin"
_WEIGHTS = (WEIGHTS_NAME, _PICKLE, INITIAL_NAME)
_LIMITS = {
    CONFIG_NAME: 16 * _MB,
    MANIFEST_NAME: 16 * _MB,
    STAGE_NAME: _MB,
    TEMPLATE_NAME: _MB,
    PROCESSOR_NAME: _MB,
    **dict.fromkeys(TOKENIZER_FILES, 64 * _MB),
}
_BLOCK = _MB
_MOST_TEMPLATES = 16
_TRIES, _PAUSE = 5, 0.05


@dataclass(frozen=True)
class PrivateCopy:
    """A copied folder.

    Attributes:
        folder: where the copy lies, as long as it is used.
        original: what it is a copy of.
        digest: SHA-256 of all files that were copied.
    """

    folder: Path
    original: Path
    digest: str

    def said(self, text: str) -> str:
        """`text` with the name of the original where it names the copy."""
        return text.replace(str(self.folder), str(self.original))


@contextmanager
def private_copy(folder: Path, weights: int, root: Path | None = None) -> Iterator[PrivateCopy]:
    """Copies what an adapter's folder has for serving, and removes the copy at the end.

    Args:
        weights: how many bytes a file of weights may have.
        root: what the folder and its files must lie below, where links lead out too.

    Raises:
        InputError: there is no such folder, a file is too large, no regular file, or a link out of
            the root, or files change again and again while they are copied.
        LorakitError: there is no room for the copy.
    """
    limits = {**_LIMITS, **dict.fromkeys(_WEIGHTS, weights)}
    try:
        holder = TemporaryDirectory(prefix="lorakit-", ignore_cleanup_errors=True)
    except OSError as error:
        raise LorakitError(f"there is no temporary folder to copy adapters to: {error}") from error
    with holder as parent:
        target = Path(parent) / (folder.name or "adapter")
        digest = None
        for number in range(_TRIES):
            if number:
                time.sleep(_PAUSE)
            if (digest := _copied(folder, root, target, limits)) is not None:
                break
        if digest is None:
            raise InputError(
                f"{folder} changes while it is read: load it when all of it has been written"
            )
        yield PrivateCopy(target, folder, digest)


def _copied(folder: Path, root: Path | None, target: Path, limits: dict[str, int]) -> str | None:
    """The digest of the files that are now in `target`; None if they changed meanwhile."""
    with ExitStack() as stack:
        try:
            source = stack.enter_context(Folder(folder, root))
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
            if root is not None:  # the same words whatever lies there
                raise InputError(
                    f"there is no folder '{str(folder)[:200]}' below the server's --adapter-root"
                ) from error
            raise InputError(
                f"{folder} is not a folder: give an adapter's folder (with {CONFIG_NAME})"
            ) from error
        limits = limits | dict.fromkeys(_more_templates(source, folder), _MB)
        files = _opened(source, stack, folder, limits)
        before = [_state(descriptor) for descriptor in files.values()]
        total = hashlib.sha256()
        with _writing(target):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for name in files:
                (target / name).parent.mkdir(exist_ok=True)
        for name, descriptor in files.items():
            size, digest = _copy(descriptor, target / name, folder / name, limits[name])
            total.update(f"{name} {size} {digest}\n".encode())
        if before != [_state(descriptor) for descriptor in files.values()]:
            return None
    # By now another folder, or another file, may be what the names stand for.
    with ExitStack() as stack:
        try:
            again = _opened(stack.enter_context(Folder(folder, root)), stack, folder, limits)
        except (OSError, ValueError, RuntimeError, InputError):
            return None
        now = [_state(descriptor) for descriptor in again.values()]
        return total.hexdigest() if (list(again), now) == (list(files), before) else None


def _more_templates(source: Folder, folder: Path) -> list[str]:
    """The files of chat templates that have names."""
    names: list[str] = []
    with _reading(folder, ADDITIONAL):
        names = sorted(name for name in source.names_in(ADDITIONAL) if name.endswith(".jinja"))
    if len(names) > _MOST_TEMPLATES:
        raise InputError(f"{folder} has {len(names)} chat templates: {_MOST_TEMPLATES} are read")
    return [f"{ADDITIONAL}/{name}" for name in names]


def _opened(
    source: Folder, stack: ExitStack, folder: Path, limits: dict[str, int]
) -> dict[str, int]:
    """Descriptors of the files that there are, by name."""
    found: dict[str, int] = {}
    for name in limits:
        if name == _PICKLE and WEIGHTS_NAME in found:
            continue
        with _reading(folder, name):
            found[name] = source.open_file(name)
            stack.callback(os.close, found[name])
    return found


@contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    """Says why a file cannot be read; one that is not there is passed over."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OutsideError as error:
        raise InputError(
            f"'{name}' of that folder lies outside the server's --adapter-root"
        ) from error
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise InputError(f"{folder / name} cannot be read: {why.lower()}") from error


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LorakitError(f"{target} cannot be written: {error}") from error


def _state(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _copy(descriptor: int, target: Path, name: Path, limit: int) -> tuple[int, str]:
    """Copies a file of at most `limit` bytes; its size and SHA-256."""
    too_large = InputError(f"{name} is larger than the {limit:,} bytes that are read of it")
    if os.fstat(descriptor).st_size > limit:
        raise too_large
    digest, size = hashlib.sha256(), 0
    with _writing(target), target.open("wb") as copy:
        while block := _read(descriptor, name):
            size += len(block)
            if size > limit:
                raise too_large
            digest.update(block)
            copy.write(block)
    return size, digest.hexdigest()


def _read(descriptor: int, name: Path) -> bytes:
    try:
        return os.read(descriptor, _BLOCK)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error}") from error
