"""`lorakit demo`: the main job in a few minutes, on the bundled model."""

import sys
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from lorakit.console import write
from lorakit.errors import InputError


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new folder; default: lorakit-demo.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Install the bundled model if it is missing.")
    ] = False,
    images: Annotated[
        bool,
        typer.Option("--images", help="Teach it to see: colors, shapes and digits in pictures."),
    ] = False,
    rl: Annotated[
        bool,
        typer.Option("--rl", help="Reinforcement learning (GRPO): from rewards, not answers."),
    ] = False,
) -> None:
    """Teach the bundled model a task, and measure what it learned.

    It takes a few minutes.
    """
    from lorakit.demo.needs import require_model

    if images and rl:
        raise InputError("--images and --rl are two demos: give one of them")
    somebody = sys.stdin.isatty() and sys.stderr.isatty()
    require_model(yes, _ask if somebody else None)

    folder = output or _free_name("lorakit-demo")
    if images:
        from lorakit.demo.run_pictures import run_picture_demo

        run_picture_demo(folder, lambda text: write(f"{text}\n"))
    elif rl:
        from lorakit.demo.run_rl import run_rl_demo

        run_rl_demo(folder, lambda text: write(f"{text}\n"))
    else:
        from lorakit.demo.run import run_demo

        run_demo(folder, lambda text: write(f"{text}\n"))


def _ask(question: str) -> bool:
    write(f"{question} [y/N] ", err=True)
    return input().strip().lower() in ("y", "yes")


def _free_name(name: str) -> Path:
    """`name`, or `name-2`, … : the demo never writes into a folder that is there."""
    names = (Path(name if n == 1 else f"{name}-{n}") for n in count(1))
    return next(path for path in names if not path.exists())
