"""Commands that are printed for the user to copy: every word is quoted for the shell at hand."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def quoted(*words: str | Path) -> str:
    """The words as one command line: POSIX shells' quotes, on Windows those of its programs."""
    if os.name == "nt":
        return subprocess.list2cmdline([str(word) for word in words])
    return shlex.join(str(word) for word in words)


def lorakit(*words: str | Path) -> str:
    """A command of lorakit's, as `lorakit merge 'my adapter' -o MODEL`."""
    return f"lorakit {quoted(*words)}"


def runnable(*words: str | Path) -> str:
    """As `lorakit`, naming the program in full where it is not on the path (a virtual environment).

    The program is the one that is running.
    """
    if shutil.which("lorakit"):
        return lorakit(*words)
    if Path(sys.argv[0]).name.startswith("lorakit"):
        return quoted(sys.argv[0], *words)
    return quoted(sys.executable, "-m", "lorakit", *words)
