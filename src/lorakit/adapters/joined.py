"""An adapter and the frozen ones that it is added to as one, for programs that take one.

Their updates add up, so that one adapter of the sum of their ranks computes the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lorakit.adapters.combine import combine
from lorakit.adapters.derived import base_of
from lorakit.adapters.lineage import State, digest, frozen_below, places, standing_on, unusable
from lorakit.adapters.manifest import FrozenRecord
from lorakit.adapters.private_copy import PrivateCopy, private_copy
from lorakit.errors import InputError
from lorakit.lora.checkpoint import read_config


@contextmanager
def joined(folder: str | Path) -> Iterator[Path]:
    """A folder with one adapter: the one in `folder`, with the frozen ones that it is added to.

    Raises:
        InputError: one of them is missing or has changed, or they cannot be joined.
    """
    below = frozen_below(folder)
    if not below:
        yield Path(folder)
        return
    with TemporaryDirectory() as elsewhere:
        one = Path(elsewhere) / Path(folder).absolute().name
        _join(Path(folder), below, one)
        try:
            yield one
        except InputError as error:  # of a folder that nobody will find
            raise InputError(str(error).replace(str(one), str(folder))) from error


class NotJoinableError(InputError):
    """An adapter that makes no single one with the frozen ones below it; `reason` says why."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"{folder} {reason}")
        self.reason = reason


@contextmanager
def joined_copy(folder: Path, weights: int, root: Path | None = None) -> Iterator[PrivateCopy]:
    """As `private_copy`, of an adapter joined with the frozen ones that it is added to.

    These are copied privately too, and must lie below the same root.

    Raises:
        NotJoinableError: they make no single adapter.
        InputError: as `private_copy`, and where one of them is missing or has changed.
    """
    with ExitStack() as stack:
        top = stack.enter_context(private_copy(folder, weights, root))
        records = standing_on(top.folder)
        child = folder if root is None else root.absolute() / folder
        below = [_copied(stack, record, child, weights, root) for record in records]
        if not below:
            yield top
            return
        elsewhere = stack.enter_context(TemporaryDirectory(prefix="lorakit-"))
        one = Path(elsewhere) / top.folder.name
        try:
            _join(top.folder, [copy.folder for copy in below], one)
        except InputError as error:
            why = top.said(str(error))
            for copy in below:
                why = copy.said(why)
            reason = f"is added to the frozen adapter {records[0].path} ({why})"
            raise NotJoinableError(folder, reason) from error
        digests = "".join(copy.digest for copy in (top, *below))
        yield PrivateCopy(one, folder, hashlib.sha256(digests.encode()).hexdigest())


def _copied(
    stack: ExitStack, record: FrozenRecord, child: Path, weights: int, root: Path | None
) -> PrivateCopy:
    """A private copy of the frozen adapter that `record` is of, as long as `stack` is open."""
    state: State = "missing"
    for place in places(record, child):
        with ExitStack() as own:
            try:
                copy = own.enter_context(private_copy(place, weights, root))
                if digest(copy.folder) == record.sha256:
                    stack.push(own.pop_all())
                    return copy
                state = "changed"
            except InputError:
                continue
    raise unusable(record, child, state)


def _join(folder: Path, below: Sequence[Path], output: Path) -> None:
    base = base_of(folder, read_config(folder), None)
    combine([folder, *below], output, weights=[1.0] * (1 + len(below)), method="cat", base=base)
