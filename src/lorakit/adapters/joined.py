"""An adapter and the frozen ones that it is added to as one, for programs that take one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lorakit.adapters.combine import combine
from lorakit.adapters.derived import base_of
from lorakit.adapters.lineage import frozen_below
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
        base = base_of(folder, read_config(folder), None)
        combine([folder, *below], one, weights=[1.0] * (1 + len(below)), method="cat", base=base)
        try:
            yield one
        except InputError as error:  # of a folder that nobody will find
            raise InputError(str(error).replace(str(one), str(folder))) from error
