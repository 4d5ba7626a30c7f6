"""What the benchmarks share: sides that take turns in processes of their own, and their medians.

A process of its own gives each side its own peak memory and its own first step. The sides take
turns because the machines are noisy and what they do in the meantime should meet all alike.
"""

import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

Figures = dict[str, float]


def take_turns(
    module: str, sides: Sequence[str], arguments: Sequence[str], rounds: int
) -> dict[str, Figures]:
    """The median of each figure that `python -m module --side SIDE` prints as its last line."""
    found: dict[str, list[Figures]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, results in found.items():
            command = [sys.executable, "-m", module, "--side", side, *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{side}: {results[-1]}", file=sys.stderr)
    return {
        side: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for side, results in found.items()
    }


def peak_memory_mb() -> float:
    """This process' peak, in 10**6 bytes: the GPU's where there is one, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@contextmanager
def memory_of_children() -> Iterator[Callable[[], float]]:
    """Gives what tells the most that processes which this one started held at once, in 10**6 bytes.

    `ru_maxrss` of ended children cannot tell it: a process counts with the memory of the one that
    has started it until it runs a program of its own. So one counts from the second look on.
    """
    peak, ended = 0, threading.Event()

    def look() -> None:
        nonlocal peak
        known: set[int] = set()
        while not ended.wait(0.2):
            held = {}
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    held[child.pid] = child.memory_info().rss
            peak = max(peak, sum(size for pid, size in held.items() if pid in known))
            known = {*held}

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield lambda: peak / 1e6
    finally:
        ended.set()
        looking.join()


def matmul_flops(dtype: str, seconds: float = 1.0) -> float:
    """FLOP a second of the fastest large product in `dtype` on the device at hand."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
