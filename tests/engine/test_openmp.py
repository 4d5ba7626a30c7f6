"""OpenMP's workers: only the thread that computes keeps any; how they wait is the user's."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lorakit.engine.engine import Engine
from lorakit.openmp import (
    _gnu_openmp,
    ask_for_what_there_is,
    release_worker_threads,
    spin_briefly,
)

OPENMP = sorted(Path(torch.__file__).with_name("lib").glob("libgomp*"))
pytestmark = pytest.mark.skipif(not OPENMP, reason="this PyTorch has not GNU's OpenMP")


def workers() -> int:
    """The threads of this process that are not Python's, once none is about to end."""
    counts: list[int] = []
    while len(set(counts[-5:])) != 1 or len(counts) < 5:
        counts.append(len([*Path("/proc/self/task").iterdir()]) - threading.active_count())
        time.sleep(0.02)
    return counts[-1]


@pytest.fixture
def compute() -> Iterator[Callable[[], None]]:
    """Computes something in the calling thread with one more thread."""
    threads = torch.get_num_threads()
    openmp = ctypes.CDLL(str(OPENMP[0]))

    def work() -> None:
        before = workers()
        openmp.omp_set_num_threads(2)
        torch.ones(1 << 20) + 1
        assert workers() == before + 1

    yield work
    openmp.omp_set_num_threads(threads)
    release_worker_threads()


def test_released(compute: Callable[[], None]):
    before = workers()
    compute()
    release_worker_threads()
    assert workers() == before
    torch.ones(1 << 20) + 1
    assert workers() == before + 1
    release_worker_threads()


def test_who_starts_an_engine_or_registers_an_adapter_keeps_none(
    start: Callable[..., Engine], adapters: dict[str, Path], compute: Callable[[], None]
):
    start(adapters={}).close()  # libraries start threads of their own
    before = workers()
    compute()
    engine = start(adapters={})
    assert workers() == before
    compute()
    engine.pool.register("shop", adapters["shop"])
    assert workers() == before


@pytest.mark.parametrize("chosen", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {}])
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]):
    monkeypatch.setattr(os, "environ", {**chosen})
    spin_briefly()
    assert chosen.items() <= os.environ.items()
    assert ("GOMP_SPINCOUNT" in os.environ) is ("OMP_WAIT_POLICY" not in chosen)


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({"OMP_THREAD_LIMIT": "3", "OMP_NUM_THREADS": "8"}, "3"),
        ({"OMP_THREAD_LIMIT": "30", "OMP_NUM_THREADS": "8,2"}, "8"),
        ({"OMP_MAX_ACTIVE_LEVELS": "0", "OMP_NUM_THREADS": "8"}, "1"),
        ({"OMP_MAX_ACTIVE_LEVELS": "2", "OMP_NUM_THREADS": "8"}, "8"),
        ({"OMP_THREAD_LIMIT": "1"}, "1"),
        ({"OMP_THREAD_LIMIT": "many"}, None),
        ({}, None),
    ],
)
def test_no_more_threads_are_asked_for_than_there_may_be(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], threads: str | None
):
    monkeypatch.setattr(os, "environ", {**given})
    ask_for_what_there_is()
    assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("setting", ["OMP_DYNAMIC=true", "OMP_THREAD_LIMIT=1"])
def test_products_in_bfloat16_are_right_with_fewer_threads_than_cores(setting: str):
    code = """from lorakit.openmp import ask_for_what_there_is
ask_for_what_there_is()
import torch
x, w = torch.randn(64, 512), torch.randn(512, 512)
found = x.bfloat16() @ w.bfloat16()
assert (found - x @ w).norm() < 0.02 * (x @ w).norm(), (found - x @ w).norm()"""
    name, value = setting.split("=")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", name: value}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_library_in_a_folder_with_a_space_is_found(tmp_path: Path):
    (tmp_path / "a b").mkdir()
    copied = shutil.copy(OPENMP[0], tmp_path / "a b" / "libgomp.so.9")
    ctypes.CDLL(str(copied))
    _gnu_openmp.cache_clear()
    try:
        assert str(copied) in [library._name for library in _gnu_openmp()]
        release_worker_threads()
    finally:
        _gnu_openmp.cache_clear()
