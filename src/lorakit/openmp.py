"""How the threads of GNU's OpenMP, with which PyTorch computes on Linux, wait for one another.

A worker spins for a while when it waits, and then sleeps. Waking one takes as long as a small
product, so it should not sleep between two parallel regions. But where other programs keep the
cores busy it should: who spins holds the core that the awaited thread needs, for milliseconds in
each region. What was measured stands in docs/performance.md.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_SPINS = "5000"
"""Turns of a waiting thread until it sleeps, a third of a millisecond; by default it is 300,000."""

_PAUSE_HARD = 2  # OpenMP 5.0, omp_pause_resource_t


def spin_briefly() -> None:
    """Has waiting threads sleep soon, if PyTorch is not loaded yet; what the user has set stays."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def ask_for_what_there_is() -> None:
    """Has PyTorch ask for no more threads than it gets, if it is not loaded yet.

    oneDNN divides a product in bfloat16 among the threads that it asks for, and leaves out the
    parts of those that do not come: what is returned is wrong, or NaN, without a word. They do not
    come where OMP_DYNAMIC, OMP_THREAD_LIMIT or OMP_MAX_ACTIVE_LEVELS says so.
    """
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true":
        os.environ["OMP_DYNAMIC"] = "false"  # without it as many come as are asked for
    limits = [_number("OMP_THREAD_LIMIT")]
    if (levels := _number("OMP_MAX_ACTIVE_LEVELS")) is not None:
        limits.append(1 if levels < 1 else None)
    if limit := min((one for one in limits if one), default=0):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        asked = _number("OMP_NUM_THREADS") or cores or os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = str(min(asked, limit))


def _number(name: str) -> int | None:
    """A variable's number, of several the first; None where it has none."""
    text = os.environ.get(name, "").partition(",")[0].strip()
    return int(text) if text.isascii() and text.isdigit() else None


def release_worker_threads() -> None:
    """Ends the worker threads of the calling thread; its next parallel region starts new ones.

    Each thread that has computed something keeps workers of its own. Where all together are more
    than the cores, they no longer spin at all: a step of training took 1.3 times as long. So a
    thread that is not the one that computes gives its workers back.
    """
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
        paths = {line.split(maxsplit=5)[5] for line in mapped if "/libgomp" in line}
        found = [ctypes.CDLL(path) for path in sorted(paths)]
    except OSError:  # another system, or a file that was replaced meanwhile
        return []
    return [library for library in found if hasattr(library, "omp_pause_resource_all")]
