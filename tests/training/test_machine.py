"""What training sets on the process: as many threads as there are cores, and memory kept."""

import os
import subprocess
import sys

import pytest

from lorakit.training import machine

FAULTS = """
import resource, torch
from lorakit.training.machine import keep_freed_memory, return_freed_memory, used_memory_mb
def use():
    for _ in range(20):
        torch.empty(2**24).fill_(1)  # 64 MB
def faults():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
returned = faults()
assert keep_freed_memory()
kept = faults()
below = torch.ones(2**24)
above = torch.ones(2**10)  # so that what is below cannot go by itself
del below
there = used_memory_mb()
return_freed_memory()
print(kept, returned, round(1e6 * (there - used_memory_mb())))
"""


def glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (AttributeError, ValueError):
        return False


@pytest.mark.skipif(not glibc(), reason="another C library")
def test_freed_memory_is_used_again_without_page_faults_until_it_is_returned():
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    printed = subprocess.check_output([sys.executable, "-c", FAULTS], env=env)
    kept, returned, given_back = map(int, printed.split())
    assert kept < returned / 10
    assert given_back > 2**25


def test_memory_is_left_alone_where_the_user_has_set_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not machine.keep_freed_memory()


def test_a_container_s_share_limits_the_cores(tmp_path, monkeypatch: pytest.MonkeyPatch):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(machine, "_CGROUP_QUOTA", quota)
    everything = machine.available_cores()  # no such file
    assert everything == len(os.sched_getaffinity(0))
    for text, cores in (("max 100000", everything), ("50000 100000", 1), ("900000 100000", 9)):
        quota.write_text(text)
        assert machine.available_cores() == min(cores, everything)
