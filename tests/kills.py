"""Work that is killed again and again, at moments that nobody chose, until it comes to its end."""

import os
import random
import signal
import time
import traceback
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil

import lorakit
from forked import forked

_WEIGHTS = "adapter_model.safetensors"
_RUN = """
import lorakit.training.run as run
import lorakit.training.setup, transformers.trainer, transformers.models.llama.modeling_llama
"""


def _drive(told: Any, prepare: str, work: str, values: Any, seed: int, within: Any) -> None:
    """Tells how often the work was killed, or what went wrong."""
    scope = {"values": values}
    moments, kills = random.Random(seed), 0
    try:
        exec(prepare, scope)  # imports once and then forks, so that starting again takes no time
        while kills < 100:
            child = os.fork()
            if child == 0:
                exec(work, scope)
                os._exit(0)
            limit = moments.uniform(*within) + 0.1 * kills  # of its own time, however busy
            while sum(psutil.Process(child).cpu_times()[:2]) < limit:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    told.send(kills if status == 0 else f"status {status}")
                    return
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        told.send("it does not end")
    except BaseException:
        told.send(traceback.format_exc())  # a failure of the work comes from its own process
        os._exit(1)


def kill_until_done(
    prepare: str, work: str, values: Any, *, seed: int, within: tuple[float, float]
) -> int:
    """Runs `work` until it ends, and kills it after some seconds of its CPU time each time.

    Args:
        prepare: Python that imports what `work` needs.
        work: Python that resumes, with `values` in its scope.
        values: plain JSON.
        within: between which seconds the first kills are; each later one is 0.1 s later.

    Returns: how often it was killed.
    """
    told, tells = Pipe(duplex=False)
    forked(_drive, tells, prepare, work, values, seed, within)
    tells.close()  # so that its end is noticed
    kills: int | str = told.recv()
    assert isinstance(kills, int), kills
    return kills


def assert_resumes_to_the_same_bytes(values: dict[str, Any]) -> tuple[Path, Path]:
    """Trains a recipe that is killed at least three times, and once more undisturbed.

    Returns: the folders of both runs.
    """
    work = "run.train(values, resume=True, quiet=True)"
    assert kill_until_done(_RUN, work, values, seed=7, within=(0.1, 1.5)) >= 3
    killed = Path(values["output_dir"])
    own = str(killed.with_name("undisturbed"))
    undisturbed = lorakit.train(values | {"output_dir": own}, quiet=True).output_dir
    assert (killed / _WEIGHTS).read_bytes() == (undisturbed / _WEIGHTS).read_bytes()
    return killed, undisturbed
