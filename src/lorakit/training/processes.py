"""Several processes as one run: how they find each other, and which of them says what failed.

torchrun and accelerate start them; training together is Trainer's. Imports nothing heavy before
there are several processes.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from lorakit.errors import InputError

_LAUNCHED_WITH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILURES = "lorakit_failures"


def process_count() -> int:
    """The number of processes of this run, as their launcher has set it.

    Raises:
        InputError: the environment says that there are several, and not where they meet.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise InputError(f"WORLD_SIZE is {said!r}, and should be the number of processes: unset it")
    apart = {"RANK", "LOCAL_RANK"} & os.environ.keys()
    missing = [name for name in _LAUNCHED_WITH if name not in os.environ]
    if missing and (int(said) > 1 or apart):
        raise InputError(
            f"the environment says that this is one of several processes, without "
            f"{', '.join(missing)}: start them with torchrun or accelerate launch, or unset "
            f"{', '.join(sorted(apart | ({'WORLD_SIZE'} & os.environ.keys())))}"
        )
    return int(said)


def join(backend: str | None = None, timeout_s: float = 1800) -> None:
    """Meets the other processes, if there are any; those of later calls have met already.

    Args:
        backend: torch.distributed's name of it; None is NCCL with GPUs and gloo without.
        timeout_s: how long to wait for the others, here and in each later exchange.

    Raises:
        InputError: they cannot be reached, or the environment does not say where they are.
    """
    if process_count() == 1:
        return
    import torch
    from accelerate import PartialState

    if torch.distributed.is_initialized():
        return
    on_cpu = not torch.accelerator.is_available()
    try:
        PartialState(cpu=on_cpu, backend=backend, timeout=timedelta(seconds=timeout_s))
    except (torch.distributed.DistError, ValueError, RuntimeError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]
        raise InputError(f"the other processes cannot be reached at {where}: {reason}") from error


def first_to_fail() -> bool:
    """Whether this process is the first of its run that failed, and so says why.

    What fails in all of them is said once; and a process that lost the connection to one that
    failed has nothing to add to it.
    """
    try:
        if process_count() == 1:
            return True
        join()
        from torch.distributed.distributed_c10d import _get_default_store

        return int(_get_default_store().add(_FAILURES, 1)) == 1
    except ValueError:  # the others were never met
        return True
    except RuntimeError:  # the process that kept the store is gone: it failed before
        return False


def require_same_view(found: str | None, folder: Path) -> None:
    """Raises InputError unless all processes of the run have `found` the same in `folder`."""
    if process_count() == 1:
        return
    from accelerate.utils import gather_object

    names: list[Any] = gather_object([found])
    if len(set(names)) > 1:
        seen = ", ".join(f"process {i} sees {name or 'none'}" for i, name in enumerate(names))
        raise InputError(
            f"output_dir: {folder} must be on a file system that all nodes share, and holds "
            f"another last checkpoint on some: {seen}"
        )
