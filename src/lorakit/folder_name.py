"""What a folder is called: the name that the user knows it by, also where it is a symbolic link."""

import os
from pathlib import Path


def folder_name(path: str | Path) -> str:
    """The last part of the path, whatever a link points to; `.` and `..` are the folders' names."""
    return os.path.basename(os.path.abspath(path))  # noqa: PTH100, PTH119 (resolve follows links)
