"""Runs several recipes one after the other, for tests that start it in several processes once.

The JSON file lists pairs: a recipe, and the name of the run beside its own that it goes on with
from the first checkpoint (null starts anew). What is refused becomes a line of `refused.txt`.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

import lorakit
from lorakit.errors import LorakitError


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


if __name__ == "__main__":
    PartialState(cpu=True)
    for values, goes_on_with in json.loads(Path(sys.argv[1]).read_text()):
        run(values, goes_on_with)
