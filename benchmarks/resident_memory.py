"""What a process has in memory, and whether that grows while it is under load."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path


def resident_mb(process: int) -> float:
    """What a process has in memory now, in 10**6 bytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def growth(samples: Sequence[float]) -> str:
    """A line about samples taken at equal times: the median of their earlier and later half.

    The first fifth fills what grows with use (the cache's rows, the adapters in memory), and is
    left out. Fewer than ten samples tell nothing.
    """
    if len(samples) < 10:
        return "memory: too short a time to tell"
    settled = samples[len(samples) // 5 :]
    half = len(settled) // 2
    early, late = (statistics.median(part) for part in (settled[:half], settled[half:]))
    return f"memory: {early:.0f} MB, then {late:.0f} MB ({late / early - 1:+.1%})"
