"""`lorakit import`: another tool's adapter as PEFT's files."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.console import say, say_all


def import_adapter(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors file, mlx-lm's folder, or PEFT's on ChatGLM's original code."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder for the adapter.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, when the folder does not name it.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="lora_alpha, if the files do not store it (loralib) or another is meant."
        ),
    ] = None,
) -> None:
    """Convert an adapter of mlx-lm, loralib, kohya or ChatGLM's code.

    The result is PEFT's files.
    """
    from lorakit.adapters.foreign import import_adapter as run

    imported = run(source, output, base=base, alpha=alpha)
    ranks = ", ".join(f"rank {r}: {count}" for r, count in imported.ranks.items())
    say(f"adapter: {imported.output} (from {imported.tool}, {imported.modules} modules, {ranks})")
    say_all(imported.notices, err=False)
