"""`lorakit convert`: a base model in a layout of its own to transformers'."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.console import say


def convert(
    source: Annotated[
        str, typer.Argument(help="A model that needs code of its own: a folder or a hub id.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder for the model.")],
) -> None:
    """Write a model in the layout of plain transformers.

    For models that were published with code of their own; the result needs none of it.
    """
    from lorakit.models.layouts.convert import convert as run
    from lorakit.models.names import resolve

    done = run(resolve(source).path, output)
    say(
        f"{done.kind}: {done.output} ({done.tensors} tensors, "
        f"{done.parameters:,} parameters, {done.dtype})"
    )
