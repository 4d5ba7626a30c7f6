"""`lorakit convert`: a base model in ChatGLM's original layout to transformers' own."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.console import say


def convert(
    source: Annotated[
        str, typer.Argument(help="ChatGLM2, ChatGLM3 or GLM-4 as published: a folder or a hub id.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder for the model.")],
) -> None:
    """Write a ChatGLM model in the layout of plain transformers.

    The result needs none of the original code.
    """
    from lorakit.models.layouts.convert import convert as run
    from lorakit.models.names import resolve

    done = run(resolve(source).path, output)
    say(
        f"{done.kind}: {done.output} ({done.tensors} tensors, "
        f"{done.parameters:,} parameters, {done.dtype})"
    )
