"""OpenMP's worker threads belong to the one thread that computes.

GNU's OpenMP gives each thread that has computed something workers of its own and keeps them. Where
there are more threads than cores in all, its workers no longer spin between two parallel regions
but sleep, and waking one takes as long as a small product: a step of training then takes 1.3 times
as long. So a thread that is not the engine's gives its workers back when it has computed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_PAUSE_HARD = 2  # OpenMP 5.0, omp_pause_resource_t


def release_worker_threads() -> None:
    """Ends the worker threads of the calling thread; its next parallel region starts new ones."""
    for openmp in _gnu_openmp():
        openmp.omp_pause_resource_all(_PAUSE_HARD)


@contextmanager
def released_afterwards() -> Iterator[None]:
    """The calling thread has no worker threads when the block has ended."""
    try:
        yield
    finally:
        release_worker_threads()


@cache
def _gnu_openmp() -> list[ctypes.CDLL]:
    """GNU's library, as PyTorch and others have loaded it; other kinds have no such limit."""
    try:
        mapped = Path("/proc/self/maps").read_text("utf-8").splitlines()
    except OSError:  # another system
        return []
    paths = {line.split()[-1] for line in mapped if Path(line).name.startswith("libgomp")}
    found = [ctypes.CDLL(path) for path in sorted(paths)]
    return [library for library in found if hasattr(library, "omp_pause_resource_all")]
