"""Work that is killed again and again, at moments that nobody chose, until it comes to its end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lorakit

_WEIGHTS = "adapter_model.safetensors"
_RUN = """
import lorakit.training.run as run
import lorakit.training.setup, transformers.trainer, transformers.models.llama.modeling_llama
"""

# Imports once and then forks, so that starting again takes no time.
_DRIVER = """
import json, os, random, signal, sys, time
import psutil

values, seed, shortest, longest, prepare, work = json.loads(sys.argv[1])
exec(prepare)
moments, kills = random.Random(seed), 0
while True:
    child = os.fork()
    if child == 0:
        exec(work)
        os._exit(0)
    limit = moments.uniform(shortest, longest) + 0.1 * kills  # of its own time, however busy
    while sum(psutil.Process(child).cpu_times()[:2]) < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, status
            print(kills)
            sys.exit(0)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    assert kills < 100
"""


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
    arguments = json.dumps([values, seed, *within, prepare, work])
    driver = subprocess.run(
        [sys.executable, "-c", _DRIVER, arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert driver.returncode == 0, driver.stderr
    return int(driver.stdout.splitlines()[-1])


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
