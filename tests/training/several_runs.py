"""Runs several recipes one after the other, in two processes that are started once.

The JSON file lists pairs: a recipe, and the name of the run beside its own that it goes on with
from the first checkpoint (null starts anew). What is refused becomes a line of `refused.txt`.
The processes are forks of one that has imported everything, which takes longer than most runs. That
`torchrun` and `accelerate launch` start the same is tested by themselves.
"""

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import lorakit
from forked import forked
from lorakit.errors import LorakitError


def in_two_processes(listed: Path) -> None:
    """Trains the recipes that the file `listed` has."""
    said = listed.with_name("errors.txt")
    process = forked(launch, str(listed), str(said))
    process.join(300)
    assert process.exitcode == 0, said.read_text()


def cut_back(finished: Path, folder: Path) -> None:
    """Copies a run as if it had been killed after its first checkpoint."""
    shutil.copytree(finished, folder)
    kept = ("checkpoint-2", "lorakit-run.json", "metrics.jsonl")
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(values: dict[str, Any], goes_on_with: str | None) -> None:
    """Trains as one of several processes."""
    folder, state = Path(values["output_dir"]), PartialState()
    if goes_on_with and state.is_main_process:
        cut_back(folder.parent / goes_on_with, folder)
    state.wait_for_everyone()
    try:
        lorakit.train(values, resume=bool(goes_on_with), quiet=True)
    except LorakitError as error:
        if state.is_main_process:
            with (folder.parent / "refused.txt").open("a") as file:
                file.write(f"{folder.name}: {error}\n")
    state.wait_for_everyone()


def part(rank: int, port: int, listed: str) -> None:
    """Becomes one of two processes, which never returns."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 1
    try:
        PartialState(cpu=True)
        for values, goes_on_with in json.loads(Path(listed).read_text()):
            run(values, goes_on_with)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def launch(listed: str, said: str) -> None:
    """Starts both, and fails when one of them fails; their errors are in the file `said`."""
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        chosen = free.getsockname()[1]
    children = []
    for number in range(2):
        if not (child := os.fork()):
            part(number, chosen, listed)
        children.append(child)
    for _ in children:
        ended, status = os.wait()
        if status:
            os.kill(sum(children) - ended, signal.SIGKILL)
            sys.exit(1)
