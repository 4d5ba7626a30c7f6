"""What training asks of the machine at hand and sets on the process: threads and memory.

All that is set changes how fast numbers come, none of it what they are.
What was measured stands in docs/performance.md.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path

import psutil
import torch

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BLOCK, _KEPT_BEFORE_2_35 = 2**30, 2**25  # older releases refuse more
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


LESS_MEMORY = (
    "lower training.per_device_train_batch_size (and raise gradient_accumulation_steps), "
    "training.per_device_eval_batch_size or data.max_length, or set "
    "training.gradient_checkpointing=true"
)
"""What to do where the memory is not enough."""


def settle_in() -> None:
    """Sets threads and memory for training in this process; what the user has set stays."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    if not torch.cuda.is_available():
        keep_freed_memory()
        # PyTorch asks for pages of 2 MB for tensors that fill some, if this is so from its first
        # tensor on: what a long run has scattered over memory is found in fewer steps.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def is_main_process() -> bool:
    """Whether this process writes and speaks: of those that torchrun or accelerate started, one."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def available_cores() -> int:
    """The cores that this process may use: its affinity, and a container's share (cgroup v2)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_QUOTA.read_text("ascii").split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # another system, or "max": no limit
        return cores


def memory_mb() -> float:
    """What a process may have at most: the GPU's memory, or the machine's or container's; in MB."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1] / 1e6
    whole = psutil.virtual_memory().total
    try:
        return min(whole, int(_CGROUP_MEMORY.read_text("ascii"))) / 1e6
    except (OSError, ValueError):  # another system, or "max": no limit
        return whole / 1e6


def peak_memory_mb() -> float:
    """The process's peak resident memory, or the GPU's when there is one; in MB of 10**6 bytes."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return round(getattr(memory, "peak_wset", memory.rss) / 1e6, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def used_memory_mb() -> float:
    """What the process holds now: resident, or on the GPU when there is one; in MB of 10**6."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6
    return psutil.Process().memory_info().rss / 1e6


def keep_freed_memory() -> bool:
    """Lets freed blocks of memory be used again instead of going back to the system.

    By default glibc asks the system anew for every large tensor, and each of its pages costs a
    fault when it is first touched. It costs memory, since blocks kept are of other sizes than the
    next ones. Holds for the rest of the process. True where this C library can do otherwise.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"} & os.environ.keys():
        return False  # the user has chosen how memory is managed
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    kept = any(mallopt(_M_MMAP_THRESHOLD, block) for block in (_KEPT_BLOCK, _KEPT_BEFORE_2_35))
    # What one thread has freed is for the others too.
    return kept and bool(
        mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BLOCK - 1) and mallopt(_M_ARENA_MAX, 1)
    )


def return_freed_memory() -> None:
    """Gives the system what `keep_freed_memory` has kept, wherever it lies; it is kept again then.

    Where blocks of all sizes come and go for hours, what is free between them grows.
    """
    trim = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
