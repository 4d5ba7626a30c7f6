"""Commands that are printed for the user to copy: every word is quoted for the shell at hand."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def quoted(*words: str | Path) -> str:
    """The words as a part of a command line: POSIX shells' quotes, on Windows its programs'."""
    if os.name == "nt":
        return subprocess.list2cmdline([str(word) for word in words])
    return shlex.join(str(word) for word in words)


def runnable(*words: str | Path) -> str:
    """A command of lorakit's that works where this process was started.

    The program is named in full where it is not on the path (a virtual environment).
    """
    if shutil.which("lorakit"):
        return quoted("lorakit", *words)
    if Path(sys.argv[0]).stem == "lorakit":
        return quoted(sys.argv[0], *words)
    return quoted(sys.executable, "-m", "lorakit", *words)
