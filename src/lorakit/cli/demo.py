"""`lorakit demo`: the main job in a few minutes, on the bundled model."""

from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from lorakit.console import write


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new folder; default: lorakit-demo.")
    ] = None,
) -> None:
    """Teach the bundled model a task, and measure what it learned.

    It takes a few minutes.
    """
    from lorakit.demo.run import run_demo

    run_demo(output or _free_name("lorakit-demo"), lambda text: write(f"{text}\n"))


def _free_name(name: str) -> Path:
    """`name`, or `name-2`, … : the demo never writes into a folder that is there."""
    names = (Path(name if n == 1 else f"{name}-{n}") for n in count(1))
    return next(path for path in names if not path.exists())
