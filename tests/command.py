"""The real `lorakit` command, run as a person would."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def run_lorakit(
    folder: Path, *arguments: str | Path, stdin: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Runs the command in `folder`; what it says is text."""
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True)
